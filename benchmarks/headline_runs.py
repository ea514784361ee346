"""One short learning run on the demo task: pass@1 against steps, samples, tokens and seconds.

Seconds are those that this process had of one core, so that company on the machine does not count;
evaluations are not in them. What a method samples before its first step is apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from headline_cases import LEARNERS, config_of
from safetensors.torch import load_model, save_model

from fastrl.assembly import build_trainer
from fastrl.config_io import as_paths
from fastrl.held_out import evaluate_held_out
from fastrl.methods.needs import requirements
from fastrl.reference import make_reference
from fastrl.trainer import StepOutput, Trainer
from fastrl.warm_start import WarmStart

BEFORE = ("warm_start", "model", "task", "data", "seed")
"""Tables and fields that a warm-started policy depends on."""


def learn(name: str, seed: int, warm_starts: Path, num_steps: int | None = None) -> dict[str, Any]:
    """The run of a learner; num_steps: fewer than its own, to try it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(name, seed, Path(directory))
        trainer = build_trainer(config)
        with closing(trainer.sampler.scorer):
            warm_start(trainer, warm_starts)
            if "ref_logps" in requirements(trainer.method):
                trainer.reference = make_reference(trainer.policy, "auto")
            curve = Curve(trainer)
            curve.prepare()
            curve.evaluate(0)
            last = num_steps or config.max_steps
            for step in range(last):
                curve.step(step)
                if (step + 1) % config.eval.eval_steps == 0 or step + 1 == last:
                    curve.evaluate(step + 1)
    return {
        "learner": name, "seed": seed, "said": LEARNERS[name].said, "before": curve.before,
        "points": curve.points, "peak_bytes": trainer.memory.highest,
    }  # fmt: skip


def make_warm_start(seed: int, warm_starts: Path) -> None:
    """Of all learners of a seed, so that none of them has to."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_trainer(config_of("GRPO", seed, Path(directory)))
        with closing(trainer.sampler.scorer):
            warm_start(trainer, warm_starts)


def warm_start(trainer: Trainer, warm_starts: Path) -> None:
    """The supervised steps of the demo: taken once for a seed, then read from a file."""
    options = as_paths(trainer.config).items()
    known = [(key, str(value)) for key, value in options if key.startswith(BEFORE)]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    path = warm_starts / f"{trainer.config.seed}-{digest}.safetensors"
    if path.exists():
        load_model(trainer.policy.model, path)
        return
    phase = WarmStart(trainer.config, trainer)
    for step in range(trainer.config.warm_start.steps):
        phase.train_step(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")  # another process may be at the same
    save_model(trainer.policy.model, str(partial))
    partial.replace(path)


class Curve:
    """What a run has spent so far, and its pass@1 whenever it is asked for."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.prompts = trainer.encode(trainer.task.eval_examples())
        self.before = {"seconds": 0.0, "samples": 0}
        self.points: list[dict[str, float]] = []
        self.spent = {"seconds": 0.0, "samples": 0, "sampled_tokens": 0, "trained_tokens": 0}
        self.rewards: list[float] = []  # since the last evaluation

    def prepare(self) -> None:
        """What the method samples before its first step, if it does."""
        values = self.trainer.sampler.values
        if values is None or values.is_ready:
            return
        began = time.process_time()
        summary = values.prepare()
        self.before["seconds"] = time.process_time() - began
        if summary is not None:
            self.before["samples"] = summary.num_sampled * summary.num_samples

    def step(self, step: int) -> None:
        """A training step."""
        began = time.process_time()
        output = self.trainer.train_step(step)
        self.spent["seconds"] += time.process_time() - began
        if output.sampled.is_empty:
            return
        rollouts = output.sampled.everything.rollouts
        self.spent["samples"] += len(rollouts.completion_ids)
        self.spent["sampled_tokens"] += int(rollouts.lengths.sum())
        self.spent["trained_tokens"] += trained_tokens(output)
        self.rewards.append(output.metrics["reward"])

    def evaluate(self, step: int) -> None:
        """A point of the curve."""
        found = evaluate_held_out(self.trainer, self.prompts)
        rewards, self.rewards = self.rewards, []
        reward = {"reward": round(sum(rewards) / len(rewards), 5)} if rewards else {}
        spent = {**self.spent, "seconds": round(self.spent["seconds"], 3)}
        self.points.append({"step": step, **spent, **reward, "pass_at_1": found.pass_at[1]})


def trained_tokens(output: StepOutput) -> int:
    """Rows at the head in a pass with gradient, of one iteration."""
    num_tokens = int(output.sampled.trained.rollouts.lengths.sum())
    return num_tokens - round(output.metrics["down_sampling/rows_skipped"])
