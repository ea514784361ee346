"""Saved rollouts scored once more, with the rewards that a config has now.

Legend: P prompts, G num_generations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrl.assembly import load_task_and_scorer
from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.metrics import rollout_metrics
from fastrl.replay import Replay, SavedRound
from fastrl.rewards import Scorer
from fastrl.rollout_tensors import from_tensors
from fastrl.sampler import Scored, joined, rollouts_of_prompts
from fastrl.tasks import Task
from fastrl.tasks.prompt import prompt_start
from fastrl.types import StepMetrics


class Rescored(NamedTuple):
    """Metrics of every step that was recorded, as they were and as they are now."""

    steps: list[int]  # counted from 1
    recorded: list[StepMetrics]
    now: list[StepMetrics]
    num_completions: int

    @property
    def num_steps(self) -> int:
        """Steps with completions that had been scored."""
        return len(self.steps)

    @property
    def rows(self) -> list[tuple[str, tuple[float | None, float | None]]]:
        """Means over the steps by name; None for a reward that is only on one side."""
        names = dict.fromkeys([*self.recorded[0], *self.now[0]])
        return [(name, (_mean(self.recorded, name), _mean(self.now, name))) for name in names]

    @property
    def record(self) -> dict[str, Any]:
        """The same as JSON, step by step."""
        steps = [
            {"step": step, "recorded": _without_nan(before), "now": _without_nan(after)}
            for step, before, after in zip(self.steps, self.recorded, self.now, strict=True)
        ]
        return {"num_completions": self.num_completions, "steps": steps}


def rescore(config: Config, directory: Path) -> Rescored:
    """Score what is in a directory of saved rollouts with the rewards of `config`.

    Nothing is sampled and no model is loaded; the config's task must be that of the rollouts.
    """
    replay = Replay(directory)
    task, scorer = load_task_and_scorer(config)
    with closing(scorer):
        return _rescored(config, replay, task, scorer)


def _rescored(config: Config, replay: Replay, task: Task, scorer: Scorer) -> Rescored:
    found = Rescored([], [], [], 0)
    for step in replay.steps():
        before = list(_scored(replay.rounds(step), task, step))
        if not before:
            continue
        after = [Scored(x.rollouts, x.texts, scorer.score(x.rollouts, x.texts)) for x in before]
        for metrics, parts in ((found.recorded, before), (found.now, after)):
            whole = joined(parts)
            metrics.append(
                rollout_metrics(
                    whole.rollouts, whole.rewards, pass_threshold=config.eval.pass_threshold
                )
            )
        found.steps.append(step + 1)
        num_completions = found.num_completions + sum(len(part.texts) for part in before)
        found = found._replace(num_completions=num_completions)
    if not found.steps:
        raise InputError(f"{replay.directory} holds no completions that had been scored")
    return found


def _scored(rounds: list[SavedRound], task: Task, step: int) -> Iterator[Scored]:
    """The scored completions of a step, round by round, with the examples of the task."""
    for saved in rounds:
        if not saved.lines:
            continue
        indices = saved.tensors["indices"].tolist()
        examples = [task.train_example(index) for index in indices]
        if any(example.later_turns for example in examples):
            raise InputError(
                "a recording of conversations holds the turn that was trained, not how they ended, "
                "so they cannot be scored again"
            )
        rollouts = rollouts_of_prompts(from_tensors(saved.tensors, examples), saved.scored_prompts)
        recorded = [line["prompt"] for line in saved.lines[:: rollouts.num_generations]]
        for example, prompt in zip(rollouts.prompts.examples, recorded, strict=True):
            if example.prompt != prompt:
                raise InputError(
                    f"step {step + 1} was recorded with the prompt {prompt_start(prompt)}, where "
                    f"this task has {prompt_start(example.prompt)}; give the same task and seed"
                )
        yield Scored(rollouts, [line["completion"] for line in saved.lines], saved.rewards)


def _mean(steps: list[StepMetrics], name: str) -> float | None:
    """Over the steps that have it, NaN left out; None where there is none."""
    values = torch.tensor([metrics[name] for metrics in steps if name in metrics]).double()
    values = values[~values.isnan()]
    return float(values.mean()) if len(values) else None


def _without_nan(metrics: StepMetrics) -> dict[str, float | None]:
    return {name: value if value == value else None for name, value in metrics.items()}
