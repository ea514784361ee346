"""What a training step did, for the logs."""

from __future__ import annotations

from dataclasses import dataclass

from fastrl.sampler import Sampled
from fastrl.types import StepMetrics


@dataclass(frozen=True)
class StepOutput:
    """Its numbers and its completions."""

    metrics: StepMetrics
    sampled: Sampled
    problem: str | None = None  # why nothing was learned, where rewards are not finite

    @property
    def num_tokens(self) -> int:
        """Of completions that have ended, each with its prompt."""
        if self.sampled.is_empty:
            return 0
        rollouts = self.sampled.everything.rollouts
        prompts = sum(len(ids) for ids in rollouts.prompts.token_ids)
        return prompts * rollouts.num_generations + int(rollouts.lengths.sum())
