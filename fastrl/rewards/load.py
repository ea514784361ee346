"""Rewards by name: a task's verifier, a built-in or a user's function, each with its weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from fastrl.errors import InputError, nearest
from fastrl.example import Example
from fastrl.rewards.function import RewardFunction, checked_function, load_function
from fastrl.rewards.math import math_reward
from fastrl.tasks import Task

BUILT_IN = ["task", "math", "exact"]


@dataclass(frozen=True)
class Reward:
    """One way to score completions and its weight in the total."""

    name: str
    weight: float
    function: RewardFunction


class NamedWeight(NamedTuple):
    """What a reward is called in metrics, and its weight in the total."""

    name: str
    weight: float


class Loaded(NamedTuple):
    """A reward's function, and whether the same completion always scores the same."""

    function: RewardFunction
    is_deterministic: bool


def load_rewards(
    specs: Sequence[str], weights: Sequence[float] | None, task: Task
) -> tuple[Reward, ...]:
    """The rewards named by "task", "math", "exact", "MODULE:FUNCTION" or "file.py:FUNCTION".

    weights: one finite number each; all 1 if None.
    """
    return tuple(
        Reward(name, weight, load_function_of(spec, task).function)
        for (name, weight), spec in zip(named_weights(specs, weights), specs, strict=True)
    )


def named_weights(specs: Sequence[str], weights: Sequence[float] | None) -> list[NamedWeight]:
    """Name and weight of each reward, after the checks that load nothing."""
    if not specs:
        raise InputError(f"expected at least one reward, got none; {nearest('', BUILT_IN)}")
    weights = [1.0] * len(specs) if weights is None else weights
    if len(weights) != len(specs):
        raise InputError(
            f"expected one weight per reward, {len(specs)}, got {len(weights)}; the rewards are "
            f"{', '.join(specs)}"
        )
    for spec, weight in zip(specs, weights, strict=True):
        if not isfinite(weight):
            raise InputError(f"the weight of the reward {spec!r} must be finite, got {weight}")
    names = [spec.rpartition(":")[2] for spec in specs]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(
                f"{count} rewards are called {name!r}, and metrics are kept by name; rename the "
                "function or remove the duplicate"
            )
    return [NamedWeight(name, float(x)) for name, x in zip(names, weights, strict=True)]


def is_user_function(spec: str) -> bool:
    """Whether a reward is a function of the user's rather than a built-in."""
    return ":" in spec


def load_function_of(spec: str, task: Task | None) -> Loaded:
    """The function of one reward; a user's is deterministic where its attribute says so.

    task: what the reward "task" verifies with; None will do for the others.
    """
    if spec == "math":
        return Loaded(math_reward, True)
    if spec == "exact":
        return Loaded(exact_reward, True)
    if spec == "task":
        assert task is not None, "the reward 'task' comes with a task"
        return Loaded(_task_reward(task), True)
    if not is_user_function(spec):
        raise InputError(
            f"unknown reward {spec!r}; {nearest(spec, BUILT_IN)}, or name a function as "
            "MODULE:FUNCTION or path/to/file.py:FUNCTION"
        )
    function = load_function(spec)
    is_deterministic = getattr(function, "deterministic", False) is True
    return Loaded(checked_function(function, spec), is_deterministic)


def exact_reward(
    examples: Sequence[Example], texts: Sequence[str], completion_ids: Sequence[list[int]]
) -> list[float | None]:
    """1.0 where completion and answer are equal after stripping, else 0.0; None without answer."""
    return [
        None if example.answer is None else float(text.strip() == example.answer.strip())
        for example, text in zip(examples, texts, strict=True)
    ]


def _task_reward(task: Task) -> RewardFunction:
    """The task's own verifier."""
    if not task.has_verifier:
        raise InputError(
            f"{task.name} has no verifier for the reward 'task'; use 'exact', 'math' or "
            "MODULE:FUNCTION"
        )

    def score(
        examples: Sequence[Example], texts: Sequence[str], completion_ids: Sequence[list[int]]
    ) -> list[float | None]:
        return [task.score(text, example) for example, text in zip(examples, texts, strict=True)]

    return score
