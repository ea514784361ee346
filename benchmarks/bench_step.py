"""A whole step of GRPO on the demo task, rollouts to new weights, against TRL's GRPOTrainer.

python benchmarks/bench_step.py [--quick] [--json PATH] [--steps N] [--rounds N]

Both train the same model, warm-started on the demo task, with the same prompts and verifier, G = 8,
two optimizer steps for each batch of completions, AdamW, clip-higher, token mean, no KL. TRL runs
on one device batch of all completions, its fastest setting here. Blocks of steps take turns. The
mean length of completions is reported for both: neither works on shorter ones.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from compare import exit_status
from measure import quantiles
from rows import OURS, Row, environment, print_table, write_json
from updates import liger_absence

from fastrl.assembly import build_trainer
from fastrl.config import Config
from fastrl.config_io import load_config
from fastrl.trainer import Trainer
from fastrl.warm_start import WarmStart

DEMO = Path(__file__).parent.parent / "examples" / "demo.toml"
GOAL = 2.0
WARM_UP = 2  # steps of a block that are not timed


class Block(NamedTuple):
    """Steps in a row: seconds of each, and the mean length of their completions in tokens."""

    seconds: list[float]
    mean_length: float


def warm_started(config: Config) -> Trainer:
    """The demo's trainer after its supervised steps."""
    trainer = build_trainer(config)
    phase = WarmStart(config, trainer)
    for step in range(config.warm_start.steps):
        phase.train_step(step)
    return trainer


def block_of_ours(trainer: Trainer, start: int, num_steps: int) -> Block:
    """Steps of FastRL."""
    seconds, lengths = [], []
    for step in range(start, start + num_steps):
        began = time.perf_counter()
        metrics = trainer.train_step(step).metrics
        seconds.append(time.perf_counter() - began)
        lengths.append(metrics["completions/mean_length"])
    return Block(seconds[WARM_UP:], sum(lengths) / len(lengths))


class TRLSteps:
    """TRL's trainer on the same model, prompts and verifier."""

    def __init__(self, trainer: Trainer, num_steps: int) -> None:
        from datasets import Dataset

        config = trainer.config
        self.task, self.config, self.num_steps = trainer.task, config, num_steps
        self.model = copy.deepcopy(trainer.policy.model)
        self.tokenizer = trainer.policy.tokenizer
        first = config.warm_start.steps * config.warm_start.batch_size
        num_prompts = config.prompts_per_step * num_steps
        examples = [self.task.train_example(first + i) for i in range(num_prompts)]
        self.examples = {str(example.prompt): example for example in examples}
        self.data = Dataset.from_dict({"prompt": [str(x.prompt) for x in examples]})

    def reward(self, prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        """The task's verifier."""
        pairs = zip(prompts, completions, strict=True)
        return [self.task.score(text, self.examples[prompt]) for prompt, text in pairs]

    def block(self) -> Block:
        """Steps of TRL, each of all iterations on one batch of completions."""
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        rollout, num_iterations = self.config.rollout, self.config.num_iterations
        marks: list[float] = []

        class Clock(TrainerCallback):
            """The time after every optimizer step."""

            def on_step_end(self, *_: Any, **__: Any) -> None:
                marks.append(time.perf_counter())

        batch = self.config.prompts_per_step * rollout.num_generations
        with tempfile.TemporaryDirectory() as directory:
            arguments = GRPOConfig(
                output_dir=directory, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
                per_device_train_batch_size=batch, num_generations=rollout.num_generations,
                max_completion_length=rollout.max_completion_length, steps_per_generation=1,
                num_iterations=num_iterations, max_steps=self.num_steps * num_iterations,
                learning_rate=self.config.optim.learning_rate, max_grad_norm=0.1, adam_beta2=0.95,
                epsilon_high=self.config.objective["epsilon_high"], beta=0.0, logging_steps=1000,
                disable_tqdm=True, seed=0,
            )  # fmt: skip
            trainer = GRPOTrainer(
                model=self.model, reward_funcs=self.reward, args=arguments,
                train_dataset=self.data, processing_class=self.tokenizer, callbacks=[Clock()],
            )  # fmt: skip
            trainer.train()
            lengths = trainer._metrics["train"]["completions/mean_length"]
            history = [x["completions/mean_length"] for x in trainer.state.log_history
                       if "completions/mean_length" in x]  # fmt: skip
        ends = marks[num_iterations - 1 :: num_iterations]
        seconds = [after - before for before, after in pairwise(ends)]
        found = lengths or history
        return Block(seconds[WARM_UP - 1 :], sum(found) / max(len(found), 1))


def measure(config: Config, num_steps: int, num_rounds: int) -> list[Row]:
    """Blocks in turns; TRL is left out, and said to be, where it is not installed."""
    trainer = warm_started(config)
    blocks: dict[str, Callable[[int], Block]] = {
        f"{OURS} step": lambda k: block_of_ours(trainer, k * num_steps, num_steps)
    }
    try:
        theirs = TRLSteps(trainer, num_steps)
        blocks["TRL GRPOTrainer"] = lambda _: theirs.block()
    except ImportError:
        print("TRL is not installed: it takes no part")
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    lengths: dict[str, list[float]] = {name: [] for name in blocks}
    for k in range(num_rounds):
        for name, run in blocks.items():
            block = run(k)
            seconds[name] += block.seconds
            lengths[name].append(block.mean_length)
    where = environment("cpu")
    rows = []
    for name, values in seconds.items():
        times = quantiles([1000 * value for value in values])
        note = f"completions of {sum(lengths[name]) / len(lengths[name]):.2f} tokens"
        rows.append(
            Row(
                case=f"GRPO step of the demo, {config.prompts_per_step} prompts x "
                f"{config.rollout.num_generations}",
                implementation=name, correct=True, environment=where, p20_ms=times.p20,
                p50_ms=times.p50, p80_ms=times.p80, note=note,
            )
        )  # fmt: skip
    return rows


def main() -> int:
    """Prints how many times faster the step is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--steps", type=int, default=12, help="of a block")
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each")
    args = parser.parse_args()
    config = load_config(DEMO)
    if args.quick:
        few = dataclasses.replace(config.warm_start, steps=20)
        config = dataclasses.replace(config, warm_start=few, prompts_per_step=8)
    print(liger_absence())
    rows = measure(config, 4 if args.quick else args.steps, 1 if args.quick else args.rounds)
    print_table(rows)
    if len(rows) > 1 and rows[0].p50_ms and rows[1].p50_ms:
        print(f"{rows[1].p50_ms / rows[0].p50_ms:.2f}x TRL's steps a second (goal {GOAL})")
    write_json(args.json, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
