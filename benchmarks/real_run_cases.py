"""Whole steps of a policy of real sizes with random weights, ours and TRL's, each in its process.

Legend: P prompt tokens, R completion tokens, G completions of a prompt, B of a step, L layers, H
heads, K head size, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_methods import Setting, make_config
from bench_shared_prefix import Case, Sizes
from measure import time_interleaved
from updates import Plan as Updates
from updates import batches, rollout_of

from fastrl.assembly import build_trainer
from fastrl.config import Config
from fastrl.memory import plan_memory

NUM_STEPS = 4  # the first compiles and is not timed
NO_TOKEN = -1  # no completion ends early
REWARD = """
def share(completion_ids, **columns):
    return [sum(ids) % 1009 / 1009 for ids in completion_ids]
"""
"""As good as never alike for two completions, which would not be trained on then."""
SIZES = {
    "tiny": Sizes(64, 2, 192, 1000),
    "0.5B": Sizes(896, 24, 4864, 151936),
    "1.5B": Sizes(1536, 28, 8960, 151936),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "GRPO, shared prefixes": ("grpo", {}),
    "D3S": ("d3s", {"num_kept": 4}),
    "GRPO, sparse head": ("entropy_top20", {}),
}
PHASES = {"rollout": ("rollout",), "train": ("score", "update", "step")}
"""What a trainer's clock tells apart, and the phases of a plan that fall into it."""


class Work(NamedTuple):
    """Operations of the update of one step."""

    needed: float
    """Of a forward and backward pass of every completion with its own copy of the prompt."""
    done: float
    """With prompts shared, and without what was dropped."""


class Measured(NamedTuple):
    """What one process found."""

    seconds: dict[str, list[float]]
    """By phase, of the steps that are timed; "step" is all of it."""
    peaks: dict[str, int]
    """Most bytes in tensors by phase on a GPU, resident ones on a CPU."""
    plans: dict[str, int]
    tokens: dict[str, float]
    """Of a step: sampled ones for "rollout", packed ones for "train"."""
    work: Work
    peak_flops: float
    """Operations a second of a large product, in this process."""
    is_right: bool
    told: str


def real_config(case: Case, method: str, directory: Path, device: str) -> Config:
    """Native engine, bfloat16 weights with exact masters; prompts of exactly P tokens."""
    name, parameters = METHODS[method]
    objective = {"parameters": parameters} if parameters else {}
    setting = Setting(method, name, case.num_generations, {"objective": objective})
    config = make_config(setting, case, str(directory), NUM_STEPS)
    (directory / "share.py").write_text(REWARD, encoding="utf-8")
    model = dataclasses.replace(config.model, device=device, precision="split")
    return dataclasses.replace(
        config, model=model, rewards=(f"{directory / 'share.py'}:share",),
        max_tokens_per_pass=16384,
    )  # fmt: skip


def run_ours(case: Case, method: str, directory: Path, device: str) -> Measured:
    """Steps of our trainer, and its memory beside what was planned for the same configuration."""
    config = real_config(case, method, directory, device)
    planned = {phase.name: phase.total for phase in plan_memory(config).phases}
    trainer = build_trainer(config)
    trainer.policy.eos_token_ids = [NO_TOKEN]
    found: list[dict[str, float]] = []
    for step in range(NUM_STEPS):
        output = trainer.train_step(step)
        found.append(output.metrics)
    names = {"rollout": "time/rollout", "train": "time/train", "step": "step_time"}
    timed, last = found[1:], found[-1]
    finite = all(math.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in timed)
    assert trainer.last_sampled is not None
    error, plain = logp_errors(trainer, trainer.last_sampled.everything.rollouts)
    return Measured(
        seconds={name: [m[key] for m in timed] for name, key in names.items()},
        peaks={
            name: int(max(m[f"memory/{name}_gib"] for m in timed) * 2**30)
            for name in PHASES
            if f"memory/{name}_gib" in last
        },
        plans={
            name: max(planned[part] for part in parts if part in planned)
            for name, parts in PHASES.items()
        },
        tokens={
            "rollout": float(case.num_prompts * case.num_generations * case.completion_length),
            "train": last["packing/tokens"],
        },
        work=work_of(case, trainer.policy.model, last),
        peak_flops=peak_flops(device),
        is_right=finite and error <= 2 * plain,
        told=f"logps off by {error:.1e} of themselves, those of plain passes by {plain:.1e}",
    )  # fmt: skip


def logp_errors(trainer: Any, rollouts: Any) -> tuple[float, float]:
    """Of a packed group and of plain forward passes, ||logps - those in float32|| / their norm."""
    from fastrl.loss import token_statistics
    from fastrl.packing import pack

    policy, device = trainer.policy, trainer.policy.device
    prompt, group = rollouts.prompts.token_ids[0], list(rollouts.completion_ids[:2])
    plan = pack([prompt], [group]).to(device)
    packed = torch.cat(list(plan.scatter(token_statistics(policy, plan, 1.0).logps))).float()
    exact = copy.deepcopy(policy.model).float()

    def plain(model: Any) -> torch.Tensor:
        found = []
        for completion in group:
            ids = torch.cat([prompt, completion]).to(device)
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].float()
            targets = completion[:, None].to(device)
            found.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
        return torch.cat(found)

    truth = plain(exact)
    errors = [float((x - truth).norm() / truth.norm()) for x in (packed, plain(policy.model))]
    return errors[0], errors[1]


def work_of(case: Case, model: Any, metrics: dict[str, float] | None) -> Work:
    """Three times a forward pass: 2 operations for every weight that a token meets.

    Head: V D weights for each trained row. Attention: 4 H K operations for each of the pairs of a
    query and a key that it sees, in every layer. metrics: of a step of ours, which say what was
    dropped; None for rows of their own.
    """
    config = model.config.get_text_config()
    P, R, G = case.prompt_length, case.completion_length, case.num_generations
    head = config.vocab_size * config.hidden_size
    body = sum(x.numel() for x in model.parameters())
    body -= head if config.tie_word_embeddings else 2 * head
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    num_rows = case.num_prompts * G
    own = 2 * body * (P + R) + 2 * head * R + pair * (P + R) ** 2 / 2
    needed = 3 * num_rows * own
    if metrics is None:
        return Work(needed, needed)
    kept = num_rows - metrics["down_sampling/completions_dropped"]
    everything = case.num_prompts * (2 * body * (P + G * R)) + num_rows * 2 * head * R
    pairs = case.num_prompts * P**2 / 2 + kept * (P * R + R**2 / 2)
    products = 3 * everything * (1 - metrics["down_sampling/flops_saved"])
    return Work(needed, products + 3 * pair * pairs)


def peak_flops(device: str) -> float:
    """Of a product of two large square matrices of random numbers."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    steps = {"product": lambda: torch.mm(left, right, out=out)}
    return 2 * size**3 / (time_interleaved(steps, device=device, seconds=0.5)["product"].p50 / 1e3)


def run_trl(case: Case, directory: Path, device: str, rows_at_once: int) -> Measured:
    """Updates of TRL's trainer on completions of the same shape, which cost it nothing.

    float32 weights, bfloat16 autocast on a GPU, activations recomputed: its defaults.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    begun: list[float] = []
    ended: list[float] = []
    given = iter(batches(Updates(case, NUM_STEPS, 1, False), SIZES["tiny"].vocabulary))
    num_rows = case.num_prompts * case.num_generations
    num_passes = num_rows // min(num_rows, rows_at_once)

    class Timed(GRPOTrainer):
        """Notes when an update begins."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begun.append(clock(device))
            return found

    class Clock(TrainerCallback):
        """Notes when an optimizer step has ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(clock(device))

    arguments = GRPOConfig(
        output_dir=str(directory / "trl"), use_cpu=device == "cpu", bf16=device == "cuda",
        report_to=[], save_strategy="no", per_device_train_batch_size=num_rows // num_passes,
        gradient_accumulation_steps=num_passes, steps_per_generation=num_passes,
        num_generations=case.num_generations, max_completion_length=case.completion_length,
        max_steps=NUM_STEPS, learning_rate=1e-6, beta=0.0, disable_tqdm=True, seed=0,
        logging_steps=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    trainer = Timed(
        model=model, reward_funcs=lambda given, **_: given, args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * case.num_prompts * NUM_STEPS}),
        processing_class=AutoTokenizer.from_pretrained(directory), callbacks=[Clock()],
        rollout_func=rollout_of(given, case.num_generations),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    seconds = [end - start for start, end in zip(begun, ended, strict=True)][1:]
    is_cuda = device == "cuda"
    return Measured(
        seconds={"train": seconds},
        peaks={"train": torch.cuda.max_memory_allocated()} if is_cuda else {},
        plans={},
        tokens={"train": float(num_rows * (case.prompt_length + case.completion_length))},
        work=work_of(case, model, None),
        peak_flops=peak_flops(device),
        is_right=all(math.isfinite(norm) and norm > 0 for norm in norms),
        told=f"{num_rows // num_passes} rows at a time, completions given",
    )


def clock(device: str) -> float:
    """Seconds, once the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
