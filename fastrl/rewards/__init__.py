"""Rewards: scores of completions, from a task's verifier, a built-in or a user's function.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan  # here `math` is the submodule, after it has been imported

import torch

from fastrl.errors import InputError, nearest
from fastrl.rewards.function import RewardFunction, function_reward
from fastrl.rewards.math import math_reward
from fastrl.tasks import Task
from fastrl.tasks.prompt import prompt_start
from fastrl.types import Example, Rewards, Rollouts

BUILT_IN = ["task", "math", "exact"]


@dataclass(frozen=True)
class Reward:
    """One way to score completions and its weight in the total."""

    name: str
    weight: float
    function: RewardFunction


def load_rewards(
    specs: Sequence[str], weights: Sequence[float] | None, task: Task
) -> tuple[Reward, ...]:
    """The rewards named by "task", "math", "exact", "MODULE:FUNCTION" or "file.py:FUNCTION".

    weights: one finite number each; all 1 if None.
    """
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
    return tuple(
        Reward(name, float(weight), _reward_function(spec, task))
        for name, weight, spec in zip(names, weights, specs, strict=True)
    )


def score_completions(
    rollouts: Rollouts, texts: Sequence[str], rewards: Sequence[Reward]
) -> Rewards:
    """Every reward of every completion, and their weighted sum in fp32.

    texts: the B decoded completions. A reward that does not apply to a completion is NaN in its
    part and adds nothing to the total.
    """
    assert len(texts) == len(rollouts.completion_ids), "one text per completion"
    num_generations = rollouts.num_generations
    examples = [rollouts.prompts.examples[b // num_generations] for b in range(len(texts))]
    return _score(examples, texts, [ids.tolist() for ids in rollouts.completion_ids], rewards)


def check_rewards(rewards: Sequence[Reward], example: Example) -> None:
    """Score one example's reference answer, so that a broken reward fails before any training."""
    # One made-up token: a function may divide by the length of a completion, which is never 0.
    _score([example], [example.answer or ""], [[0]], rewards)


def _score(
    examples: Sequence[Example],
    texts: Sequence[str],
    completion_ids: Sequence[list[int]],
    rewards: Sequence[Reward],
) -> Rewards:
    parts = {}
    total = torch.zeros(len(texts), dtype=torch.float32)  # (B,)
    applies = torch.zeros(len(texts), dtype=torch.bool)
    for reward in rewards:
        scores = reward.function(examples, texts, completion_ids)
        part = torch.tensor(
            [nan if score is None else score for score in scores], dtype=torch.float32
        )
        parts[reward.name] = part
        total += reward.weight * part.nan_to_num(nan=0.0)
        applies |= ~part.isnan()
    for b, example in enumerate(examples):
        if not applies[b]:
            raise InputError(
                f"no reward applies to a completion of the prompt {prompt_start(example.prompt)}: "
                f"{', '.join(parts)} returned None; give the example an answer or add a reward "
                "that always applies"
            )
    return Rewards(total=total, parts=parts)


def _reward_function(spec: str, task: Task) -> RewardFunction:
    if spec == "math":
        return math_reward
    if spec == "exact":
        return exact_reward
    if spec == "task":
        return _task_reward(task)
    if ":" not in spec:
        raise InputError(
            f"unknown reward {spec!r}; {nearest(spec, BUILT_IN)}, or name a function as "
            "MODULE:FUNCTION or path/to/file.py:FUNCTION"
        )
    return function_reward(spec)


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
