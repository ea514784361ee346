"""Updates of whole trainers on completions that are given: ours and TRL's, each in its process.

Legend: P prompt tokens, R completion tokens, G num_generations.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_shared_prefix import Case, Sizes, build_model
from measure import count_big_blocks, high_water_mark, reset_high_water_mark

from fastrl.assembly import build_trainer
from fastrl.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, RolloutConfig
from fastrl.phase_clock import PhaseClock
from fastrl.policy import Policy, train_tokenizer
from fastrl.sampler import Sampled, Scored
from fastrl.types import Example, Prompts, Rewards, Rollouts

LEARNING_RATE = 1e-4
MEASURED = 1  # the step, from 0, whose memory is measured: optimizer states are there by then


class Plan(NamedTuple):
    """What a trainer is to do: `num_steps` batches of completions, each `num_iterations` times."""

    case: Case
    num_steps: int
    num_iterations: int
    quick: bool
    for_memory: bool = False
    """Blocks of a mebibyte bypass the heap, so that memory can be measured; it costs time."""
    sizes: Sizes | None = None
    """Of the model, where it is not the usual one."""
    one_by_one: bool = False
    """Train as few completions at a time as the trainer can, for the least memory."""

    @property
    def tokens_per_pass(self) -> int:
        """Of our trainer: the usual number, or what one completion with its prompt takes."""
        context = self.case.prompt_length + self.case.completion_length
        # A row at the head counts as a part of a token, of these models a fifth at most.
        return context + self.case.completion_length // 4 + 1 if self.one_by_one else 4096


class Batch(NamedTuple):
    """One step's tokens and rewards."""

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float]


class Run(NamedTuple):
    """What came of it."""

    seconds: list[float]  # of each step after the first
    peak_bytes: int  # of step MEASURED, beyond what was resident before it
    losses: list[float]  # of the last iteration of each step
    grad_norms: list[float]  # likewise


def batches(plan: Plan, vocabulary: int) -> list[Batch]:
    """Random tokens, another batch each step; ragged completions have 2 to R tokens."""
    generator = torch.Generator().manual_seed(3)
    case, found = plan.case, []

    def ids(length: int) -> list[int]:
        return torch.randint(10, vocabulary, (length,), generator=generator).tolist()

    for _ in range(plan.num_steps):
        total = case.num_prompts * case.num_generations
        lengths = [case.completion_length] * total
        if case.is_ragged:
            lengths = torch.randint(
                2, case.completion_length + 1, (total,), generator=generator
            ).tolist()
        rewards = torch.randn(total, generator=generator).tolist()
        prompts = [ids(case.prompt_length) for _ in range(case.num_prompts)]
        found.append(Batch(prompts, [ids(length) for length in lengths], rewards))
    return found


def save_model(directory: str, quick: bool, sizes: Sizes | None = None) -> None:
    """The model with a tokenizer, as a directory that both trainers load."""
    tokenizer = train_tokenizer(["1 + 2 = 3"], vocab_size=300)
    model = build_model(quick, torch.float32, sizes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    Policy(model, tokenizer).save(Path(directory))


def run_ours(plan: Plan, overrides: dict[str, Any]) -> Run:
    """FastRL's trainer. overrides: fields of `config.model`."""
    if plan.for_memory:
        count_big_blocks()
    case = plan.case
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, plan.quick, plan.sizes)
        prompts = Path(directory) / "prompts.jsonl"
        prompts.write_text("".join(f'{{"prompt": "{i}", "answer": "1"}}\n' for i in range(9)))
        config = Config(
            task=f"jsonl:{prompts}", rewards=("exact",), method="grpo", reward_workers=0,
            objective={"aggregation": "token_mean"}, num_iterations=plan.num_iterations,
            prompts_per_step=case.num_prompts, max_tokens_per_pass=plan.tokens_per_pass,
            max_steps=plan.num_steps,
            data=DataConfig(eval_size=1), eval=EvalConfig(num_samples=1),
            model=ModelConfig(path=directory, **overrides),
            rollout=RolloutConfig(
                num_generations=case.num_generations, max_prompt_length=case.prompt_length,
                max_completion_length=case.completion_length,
            ),
            optim=OptimConfig(learning_rate=LEARNING_RATE),
        )  # fmt: skip
        trainer = build_trainer(config)
    given = batches(plan, trainer.policy.model.config.vocab_size)
    seconds, losses, norms, peak = [], [], [], 0
    for step, batch in enumerate(given):
        trainer.sampler = _Given(trainer.sampler, _sampled(batch, case.num_generations))
        before = reset_high_water_mark()
        trainer.memory.restart()
        began = time.perf_counter()
        metrics = trainer.train_step(step).metrics
        seconds.append(time.perf_counter() - began)
        if step == MEASURED:
            peak = (
                trainer.memory.highest - before
            )  # of all phases, each of which sets the mark back
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    return Run(seconds[1:], peak, losses, norms)


class _Given:
    """A sampling stage whose completions are there already; all else is the real one's."""

    def __init__(self, real: Any, sampled: Sampled) -> None:
        self.real = real.real if isinstance(real, _Given) else real
        self.sampled = sampled

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def sample(self, step: int, watch: PhaseClock, **_: Any) -> Sampled:
        """What was given, in no time."""
        watch.lap("rollout")
        watch.lap("score")
        return self.sampled


def _sampled(batch: Batch, num_generations: int) -> Sampled:
    """The batch as if it had just been sampled and scored."""
    examples = tuple(Example(str(index)) for index in range(len(batch.prompts)))
    rollouts = Rollouts(
        prompts=Prompts(tuple(map(torch.tensor, batch.prompts)), examples),
        completion_ids=tuple(map(torch.tensor, batch.completions)),
        rollout_logps=None,
        finished=torch.ones(len(batch.completions), dtype=torch.bool),
    )
    total = torch.tensor(batch.rewards, dtype=torch.float64)
    scored = Scored(rollouts, [""] * len(batch.completions), Rewards(total, {"given": total}))
    return Sampled(scored, scored, 1, 0)


def rollout_of(given: Iterator[Batch], num_generations: int) -> Callable[..., dict[str, Any]]:
    """A rollout_func of TRL's that samples nothing: each call takes the next batch and its rewards.

    The reward function of such a trainer is `lambda given, **_: given`.
    """

    def rollout(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        batch = next(given)
        repeated = [ids for ids in batch.prompts for _ in range(num_generations)]
        return {"prompt_ids": repeated, "completion_ids": batch.completions,
                "logprobs": None, "given": batch.rewards}  # fmt: skip

    return rollout


def run_trl(plan: Plan, overrides: dict[str, Any]) -> Run:
    """TRL's GRPOTrainer. overrides: fields of its GRPOConfig.

    What is timed begins when it has its completions, rewards and advantages, and ends after the
    optimizer's last step on them.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    if plan.for_memory:
        count_big_blocks()
    case, per_step = plan.case, plan.num_iterations
    begun: list[float] = []
    ended: list[float] = []
    losses: list[float] = []
    marks: list[int] = []
    peaks: list[int] = []

    class Timed(GRPOTrainer):
        """Notes when an update begins and what its loss is."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            marks.append(reset_high_water_mark())
            begun.append(time.perf_counter())
            return found

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    class Clock(TrainerCallback):
        """Notes when an optimizer step has ended."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ended.append(time.perf_counter())
            if state.global_step == (MEASURED + 1) * per_step:
                peaks.append(high_water_mark() - marks[MEASURED])

    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, plan.quick, plan.sizes)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        given = iter(batches(plan, model.config.vocab_size))
        size = case.num_prompts * case.num_generations

        at_once = 1 if plan.one_by_one else size
        settings = {
            "output_dir": directory, "use_cpu": True, "bf16": False, "report_to": [],
            "save_strategy": "no", "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": size // at_once,
            "num_generations": case.num_generations, "steps_per_generation": size // at_once,
            "max_completion_length": case.completion_length, "num_iterations": per_step,
            "max_steps": plan.num_steps * per_step, "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant", "beta": 0.0, "loss_type": "dapo", "disable_tqdm": True,
            "logging_steps": 1, "seed": 0, "use_vllm": False,
        }  # fmt: skip
        trainer = Timed(
            model=model, reward_funcs=lambda given, **_: given,
            args=GRPOConfig(**{**settings, **overrides}),
            train_dataset=Dataset.from_dict({"prompt": ["1"] * case.num_prompts * plan.num_steps}),
            processing_class=AutoTokenizer.from_pretrained(directory), callbacks=[Clock()],
            rollout_func=rollout_of(given, case.num_generations),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logged = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    seconds = [
        end - start for start, end in zip(begun, ended[per_step - 1 :: per_step], strict=True)
    ]
    last = slice(per_step - 1, None, per_step)
    if plan.one_by_one:  # a loss for each completion
        losses = [sum(losses[start : start + size]) for start in range(0, len(losses), size)]
    assert len(losses) == len(logged) == plan.num_steps * per_step
    return Run(seconds[1:], peaks[0], losses[last], logged[last])


def liger_absence() -> str:
    """Why TRL with Liger's layers takes no part, in one line."""
    if importlib.util.find_spec("liger_kernel") is None:
        reason = "liger-kernel is not installed"
    else:
        reason = "needs a GPU, its layers are Triton kernels"
    return f"TRL GRPOTrainer + Liger layers: absent, {reason}"
