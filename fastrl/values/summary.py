"""What stage one of A*-PO tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class ValueProgress(NamedTuple):
    """How far stage one is."""

    num_sampled: int  # prompts, by this process
    num_known: int  # prompts in the store
    seconds: float

    @property
    def line(self) -> str:
        """The same in words."""
        return (
            f"values: {self.num_sampled} prompts sampled in {self.seconds:.0f} s, "
            f"{self.num_known} known"
        )


class ValueSummary(NamedTuple):
    """What stage one found out about the prompts of a run."""

    directory: Path
    num_prompts: int  # different ones
    num_samples: int
    num_solved: int  # prompts that passed at least once
    num_dropped: int  # prompts that are never trained on
    mean_reward: float
    num_sampled: int  # prompts that were not known yet
    num_failed: int  # calls of rewards that hung or crashed, which count as 0
    num_torn: int  # batches that a killed process left half-written
    seconds: float

    @property
    def lines(self) -> list[str]:
        """The same in words."""
        found = [
            f"values: {self.num_prompts} prompts with {self.num_samples} reference completions "
            f"each, mean reward {self.mean_reward:.3f}, {self.num_solved} solved at least once "
            f"({self.num_sampled} sampled now, {self.seconds:.0f} s; {self.directory})"
        ]
        if self.num_dropped:
            found.append(f"values: {self.num_dropped} prompts were solved too rarely to train on")
        if self.num_failed:
            found.append(f"values: {self.num_failed} calls of rewards failed and count as 0")
        if self.num_torn:
            found.append(f"values: {self.num_torn} half-written batches were sampled again")
        return found


OnBatch = Callable[[ValueProgress], None]
