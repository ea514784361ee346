"""Which completions to train on, as tables of rules named after what they keep.

Legend: B completions. A rule of SELECTIONS returns (B,) bool, True where the completion is kept;
a rule of RESAMPLINGS returns (B,) int64 copies of each completion.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastrl.selection.completions import (
    explorability,
    finished_only,
    multiple_of,
    off_policy_sequence_mask,
    resampled_by_power,
    resampled_extremes,
    resampled_favouring_best,
)
from fastrl.selection.groups import (
    best,
    best_and_random,
    best_and_worst,
    first_of_completion,
    max_variance,
    max_variance_advantages,
    nonzero_std,
    pass_window,
    top_rewards,
)
from fastrl.selection.lengths import counted_lengths, with_gradient, zero_spread_fraction

SELECTIONS: dict[str, Callable[..., Tensor]] = {
    "nonzero_std": nonzero_std,
    "pass_window": pass_window,
    "max_variance": max_variance,
    "max_variance_advantages": max_variance_advantages,
    "top_rewards": top_rewards,
    "best": best,
    "best_and_worst": best_and_worst,
    "best_and_random": best_and_random,
    "finished_only": finished_only,
    "multiple_of": multiple_of,
    "off_policy_sequence_mask": off_policy_sequence_mask,
}
RESAMPLINGS: dict[str, Callable[..., Tensor]] = {
    "resampled_by_power": resampled_by_power,
    "resampled_extremes": resampled_extremes,
    "resampled_favouring_best": resampled_favouring_best,
}

BY_PROMPT = frozenset({"nonzero_std", "pass_window"})
"""Rules that keep or drop all completions of a prompt, by their rewards alone."""

__all__ = [
    "BY_PROMPT",
    "RESAMPLINGS",
    "SELECTIONS",
    "counted_lengths",
    "explorability",
    "first_of_completion",
    "with_gradient",
    "zero_spread_fraction",
]
