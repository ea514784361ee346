"""Whoever scores a run's completions: processes of their own, or this one.

Legend: B completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastrl.example import Example
from fastrl.rewards.load import Reward
from fastrl.rewards.score import check_rewards, score_completions
from fastrl.types import Rewards, Rollouts, StepMetrics


class Scorer(Protocol):
    """Scores completions; see `RewardPool`."""

    @property
    def metrics(self) -> StepMetrics:
        """Of the last call of `score`."""
        ...

    def submit(
        self, row: int, example: Example, text: str, completion_ids: Sequence[int], *,
        num_generations: int,
    ) -> None:  # fmt: skip
        """Let work on completion `row` begin while others are sampled."""
        ...

    def forget(self) -> None:
        """What was submitted is not wanted any more: the completions will be sampled again."""
        ...

    def score(self, rollouts: Rollouts, texts: Sequence[str]) -> Rewards:
        """The rewards of all B completions, of those that were submitted and of the others."""
        ...

    def check(self, example: Example) -> None:
        """Score an example's reference answer, so that a broken reward fails before training."""
        ...

    def close(self) -> None:
        """End whatever runs."""
        ...


class LocalScorer:
    """Rewards in this process: nothing to start, but one that hangs or crashes takes it along."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = tuple(rewards)
        self.metrics: StepMetrics = {}

    def submit(
        self, row: int, example: Example, text: str, completion_ids: Sequence[int], *,
        num_generations: int,
    ) -> None:  # fmt: skip
        """Nothing: scoring now would only hold up the others."""

    def forget(self) -> None:
        """Nothing was begun."""

    def score(self, rollouts: Rollouts, texts: Sequence[str]) -> Rewards:
        """See `score_completions`."""
        return score_completions(rollouts, texts, self.rewards)

    def check(self, example: Example) -> None:
        """See `check_rewards`."""
        check_rewards(self.rewards, example)

    def close(self) -> None:
        """Nothing runs."""
