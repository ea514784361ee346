"""Whole steps of our own trainer, rollouts to new weights: A*-PO against GRPO, PPO and REBEL.

python benchmarks/bench_methods.py [--quick] [--json PATH] [--case PROMPTS,P,R,G] [--only TEXT]

The same model (Qwen3, 25M parameters in its layers, V = 32000, float32), the same number of prompts
a step, completions of R tokens sampled by the native engine. GRPO and PPO sample G completions a
prompt, REBEL two, A*-PO one: what it knows of its prompts is sampled before the run (8 reference
completions each), which is timed apart. All weights are trained, or in settings "with LoRA" an
adapter of rank 16, whose reference is the adapter switched off. Each method runs in processes of
its own that take turns. Memory is all that a trainer takes with its weights, states, reference and
value model, at its highest during a step: growth of the resident set since before the model was
loaded.
"""

from __future__ import annotations

import argparse
import string
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench_shared_prefix import Case
from compare import exit_status
from measure import count_big_blocks, in_fresh_process, quantiles, reset_high_water_mark
from rows import OURS, Row, environment, print_table, write_json
from updates import save_model

from fastrl.assembly import build_trainer
from fastrl.config import (
    Config,
    CriticConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
)
from fastrl.methods.needs import requirements
from fastrl.reference import make_reference

NUM_STEPS = 3  # of which the first is not timed
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
REWARD = """
def parity(completion_ids, **columns):
    return [float(sum(ids) % 2) for ids in completion_ids]
"""


class Setting(NamedTuple):
    """A method with what differs from the others."""

    name: str
    method: str
    num_generations: int
    options: dict[str, Any]


class Run(NamedTuple):
    """What one process measured."""

    seconds: list[float]
    peak_bytes: int
    values_seconds: float  # of stage one


def settings_of(num_generations: int) -> list[Setting]:
    """All weights first, then adapters; the first of either is what others are compared with."""
    group, lora = f"G={num_generations}", {"lora": LORA}
    kl, model = {"objective": {"beta": 1e-3}}, {"critic": "model"}
    return [
        Setting(f"{OURS} A*-PO, G=1", "astar_po", 1, {}),
        Setting(f"{OURS} GRPO, {group}", "grpo", num_generations, {}),
        Setting(f"{OURS} GRPO with KL, {group}", "grpo", num_generations, kl),
        Setting(f"{OURS} REBEL, G=2", "rebel", 2, {}),
        Setting(f"{OURS} PPO, value head, {group}", "ppo", num_generations, {}),
        Setting(f"{OURS} PPO, value head, G=1", "ppo", 1, {}),
        Setting(f"{OURS} PPO, value model, {group}", "ppo", num_generations, model),
        Setting(f"{OURS} A*-PO with LoRA, G=1", "astar_po", 1, lora),
        Setting(f"{OURS} GRPO with LoRA, {group}", "grpo", num_generations, lora),
        Setting(f"{OURS} GRPO with LoRA and KL, {group}", "grpo", num_generations, {**kl, **lora}),
        Setting(f"{OURS} REBEL with LoRA, G=2", "rebel", 2, lora),
        Setting(f"{OURS} PPO with LoRA, value head, {group}", "ppo", num_generations, lora),
        Setting(f"{OURS} PPO with LoRA, value adapter, {group}", "ppo", num_generations,
                {"critic": "lora", **lora}),
    ]  # fmt: skip


def run_steps(setting: Setting, case: Case, quick: bool, for_memory: bool) -> Run:
    """Steps of a fresh trainer; for_memory: at the cost of time."""
    if for_memory:
        count_big_blocks()
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, quick)
        trainer_config = make_config(setting, case, directory, NUM_STEPS)
        before = reset_high_water_mark()
        trainer = build_trainer(trainer_config)
        if "ref_logps" in requirements(trainer.method):
            trainer.reference = make_reference(trainer.policy, "auto")
        values_seconds = 0.0
        if trainer.sampler.values is not None:
            began = time.perf_counter()
            trainer.sampler.values.prepare()
            values_seconds = time.perf_counter() - began
        seconds, peak = [], 0
        for step in range(NUM_STEPS):
            if step == 1:
                trainer.memory.restart()
            began = time.perf_counter()
            trainer.train_step(step)
            seconds.append(time.perf_counter() - began)
            if step == 1:
                peak = trainer.memory.highest - before
    return Run(seconds[1:], peak, values_seconds)


def make_config(setting: Setting, case: Case, directory: str, num_steps: int) -> Config:
    """Of a run on prompts that only differ in their number, with a reward that means nothing."""
    prompts, reward = Path(directory) / "prompts.jsonl", Path(directory) / "reward.py"
    letters = (string.ascii_letters * case.prompt_length)[: case.prompt_length - 4]
    rows = range(num_steps * case.num_prompts + 1)
    prompts.write_text("".join(f'{{"prompt": "{i:04}{letters}"}}\n' for i in rows))
    reward.write_text(REWARD)
    critic = setting.options.get("critic", "head")
    critic = directory if critic == "model" else critic
    return Config(
        task=f"jsonl:{prompts}", rewards=(f"{reward}:parity",), reward_workers=0,
        method=setting.method, objective=setting.options.get("objective", {}),
        values_dir=f"{directory}/values", prompts_per_step=case.num_prompts,
        max_tokens_per_pass=2048, max_steps=num_steps, critic=CriticConfig(model=critic),
        data=DataConfig(eval_size=1), eval=EvalConfig(num_samples=1),
        model=ModelConfig(path=directory, lora=setting.options.get("lora", {})),
        optim=OptimConfig(learning_rate=1e-6),
        rollout=RolloutConfig(
            num_generations=setting.num_generations, max_prompt_length=case.prompt_length,
            max_completion_length=case.completion_length,
        ),
    )  # fmt: skip


def measure(case: Case, settings: list[Setting], *, quick: bool) -> list[Row]:
    """Settings in turns, once for time and once for memory."""
    where, rows = environment("cpu"), []
    for setting in settings:
        timed = in_fresh_process(run_steps, setting, case, quick, False)
        weighed = in_fresh_process(run_steps, setting, case, quick, True)
        times = quantiles([1000 * value for value in timed.seconds])
        before = timed.values_seconds
        note = f"{before:.1f} s before for {NUM_STEPS} steps' prompts" if before else ""
        rows.append(
            Row(
                case=f"step{' with LoRA' if 'lora' in setting.options else ''} "
                f"prompts={case.num_prompts} P={case.prompt_length} "
                f"R={case.completion_length} float32",
                implementation=setting.name, correct=True, environment=where,
                p20_ms=times.p20, p50_ms=times.p50, p80_ms=times.p80,
                peak_bytes=weighed.peak_bytes, note=note,
            )
        )  # fmt: skip
    return rows


def report(rows: list[Row]) -> None:
    """The table of a case, and its first row as part of the others: A*-PO and its goals."""
    print_table(rows)
    first = rows[0]
    for row in rows[1:]:
        if first.p50_ms and row.p50_ms and first.peak_bytes and row.peak_bytes:
            print(
                f"{first.implementation.removeprefix(OURS).strip()} against "
                f"{row.implementation.removeprefix(OURS).strip()}: "
                f"{first.p50_ms / row.p50_ms:.2f}x the time (goal 0.50), "
                f"{first.peak_bytes / row.peak_bytes:.2f}x the memory (goal 0.70)"
            )


def read_case(text: str) -> Case:
    """PROMPTS,P,R,G as a case."""
    try:
        num_prompts, prompt, completion, num_generations = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected PROMPTS,P,R,G as four numbers such as 2,128,64,8, got {text!r}"
        ) from None
    if min(num_prompts, prompt - 4, completion, num_generations - 1) < 1:
        raise argparse.ArgumentTypeError(
            f"expected at least 1 prompt, P=5, R=1 and G=2, got {text!r}"
        )
    return Case(num_prompts, prompt, completion, num_generations)


def main() -> int:
    """Prints a table for all weights and one for adapters."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--case", type=read_case, help="PROMPTS,P,R,G; 2,128,64,8 unless given")
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    args = parser.parse_args()
    case = args.case or (Case(2, 48, 8, 8) if args.quick else Case(2, 128, 64, 8))
    chosen = [x for x in settings_of(case.num_generations) if args.only in x.name]
    if not chosen:
        names = ", ".join(x.name for x in settings_of(case.num_generations))
        parser.error(f"--only {args.only!r} is in no name; there are {names}")
    rows = []
    for with_lora in (False, True):
        settings = [x for x in chosen if ("lora" in x.options) is with_lora]
        if settings:
            found = measure(case, settings, quick=args.quick)
            report(found)
            rows += found
            write_json(args.json, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
