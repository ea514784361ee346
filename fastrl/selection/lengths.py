"""Which completions count, which of them need work at all, and which groups teach nothing.

Legend: B completions, P prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.ragged import counts, number_of
from fastrl.selection.ranking import alike
from fastrl.types import Rollouts


def counted_lengths(rollouts: Rollouts, *, mask_truncated_completions: bool) -> Tensor:
    """(B,) int64 lengths for the averages: zero where a truncated completion is to be left out."""
    lengths = rollouts.num_sampled
    return lengths * rollouts.finished if mask_truncated_completions else lengths


def with_gradient(advantages: Tensor, lengths: Tensor, *, has_penalty: bool) -> Tensor:
    """(B,) bool: completions whose gradient is not zero by construction.

    A zero advantage without a regulariser or an entropy bonus (`has_penalty`) gives exactly zero
    gradient, so the row need not be encoded. It still counts in every denominator.
    """
    counted = lengths > 0
    return counted if has_penalty else counted & (advantages != 0)


def zero_spread_fraction(rewards: Tensor, groups: Tensor) -> float:
    """Fraction of groups whose completions all scored alike and so teach a group method nothing.

    A group of one has no spread either. 0 where there are no groups.
    """
    present = counts(groups, number_of(groups)) > 0
    without_spread = alike(rewards, groups) & present
    return int(torch.sum(without_spread)) / max(int(torch.sum(present)), 1)
