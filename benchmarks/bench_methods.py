"""Whole steps of our own trainer, rollouts to new weights: A*-PO against GRPO and PPO.

python benchmarks/bench_methods.py [--quick] [--json PATH]

The same model (Qwen3, 25M parameters in its layers, V = 32000, float32), the same number of prompts
a step, completions of R tokens sampled by the native engine. GRPO and PPO sample G = 8 completions
a prompt, A*-PO one: what it knows of its prompts is sampled before the run (8 reference completions
each), which is timed apart. Each method runs in processes of its own that take turns. Memory is all
that a trainer takes with its weights, states, reference and value model, at its highest during a
step: growth of the resident set since before the model was loaded.
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


SETTINGS = (
    Setting(f"{OURS} A*-PO, G=1", "astar_po", 1, {}),
    Setting(f"{OURS} GRPO, G=8", "grpo", 8, {}),
    Setting(f"{OURS} GRPO with KL, G=8", "grpo", 8, {"objective": {"beta": 1e-3}}),
    Setting(f"{OURS} PPO, value head, G=8", "ppo", 8, {}),
    Setting(f"{OURS} PPO, value head, G=1", "ppo", 1, {}),
    Setting(f"{OURS} PPO, value model, G=8", "ppo", 8, {"critic": "model"}),
)


def run_steps(setting: Setting, case: Case, quick: bool, for_memory: bool) -> Run:
    """Steps of a fresh trainer; for_memory: at the cost of time."""
    if for_memory:
        count_big_blocks()
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, quick)
        trainer_config = _config(setting, case, directory)
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


def _config(setting: Setting, case: Case, directory: str) -> Config:
    prompts, reward = Path(directory) / "prompts.jsonl", Path(directory) / "reward.py"
    letters = (string.ascii_letters * case.prompt_length)[: case.prompt_length - 4]
    rows = range(NUM_STEPS * case.num_prompts + 1)
    prompts.write_text("".join(f'{{"prompt": "{i:04}{letters}"}}\n' for i in rows))
    reward.write_text(REWARD)
    critic = directory if setting.options.get("critic") == "model" else "head"
    return Config(
        task=f"jsonl:{prompts}", rewards=(f"{reward}:parity",), reward_workers=0,
        method=setting.method, objective=setting.options.get("objective", {}),
        values_dir=f"{directory}/values", prompts_per_step=case.num_prompts,
        max_tokens_per_pass=2048, max_steps=NUM_STEPS, critic=CriticConfig(model=critic),
        data=DataConfig(eval_size=1), eval=EvalConfig(num_samples=1),
        model=ModelConfig(path=directory), optim=OptimConfig(learning_rate=1e-6),
        rollout=RolloutConfig(
            num_generations=setting.num_generations, max_prompt_length=case.prompt_length,
            max_completion_length=case.completion_length,
        ),
    )  # fmt: skip


def measure(case: Case, *, quick: bool) -> list[Row]:
    """Settings in turns, once for time and once for memory."""
    where, rows = environment("cpu"), []
    for setting in SETTINGS:
        timed = in_fresh_process(run_steps, setting, case, quick, False)
        weighed = in_fresh_process(run_steps, setting, case, quick, True)
        times = quantiles([1000 * value for value in timed.seconds])
        before = timed.values_seconds
        note = f"{before:.1f} s before for {NUM_STEPS} steps' prompts" if before else ""
        rows.append(
            Row(
                case=f"step prompts={case.num_prompts} P={case.prompt_length} "
                f"R={case.completion_length} float32",
                implementation=setting.name, correct=True, environment=where,
                p20_ms=times.p20, p50_ms=times.p50, p80_ms=times.p80,
                peak_bytes=weighed.peak_bytes, note=note,
            )
        )  # fmt: skip
    return rows


def main() -> int:
    """Prints the table: ratios are to A*-PO, whose goals are 0.5x the time, 0.7x the memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    case = Case(2, 48, 8, 8) if args.quick else Case(2, 128, 64, 8)
    rows = measure(case, quick=args.quick)
    print_table(rows)
    first = rows[0]
    for row in rows[1:]:
        if first.p50_ms and row.p50_ms and first.peak_bytes and row.peak_bytes:
            print(
                f"A*-PO against {row.implementation.removeprefix(OURS).strip()}: "
                f"{first.p50_ms / row.p50_ms:.2f}x the time (goal 0.50), "
                f"{first.peak_bytes / row.peak_bytes:.2f}x the memory (goal 0.70)"
            )
    write_json(args.json, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
