"""Sums and means over completions of tokens and over groups of completions, all ragged.

Legend: B completions, S trained tokens, P prompts. An index maps each element to its owner.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sums(values: Tensor, index: Tensor, num_owners: int) -> Tensor:
    """(num_owners,) sums of the values of each owner, the same bits on every run; 0 for none."""
    if num_owners == 0:
        return values.new_zeros(0)
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=num_owners)
    return torch.segment_reduce(values[order], "sum", lengths=counts, initial=0)


def counts(index: Tensor, num_owners: int) -> Tensor:
    """(num_owners,) int64 elements of each owner."""
    return torch.bincount(index, minlength=num_owners)


def means(values: Tensor, index: Tensor, num_owners: int) -> Tensor:
    """(num_owners,) means; 0 for an owner of nothing."""
    return sums(values, index, num_owners) / counts(index, num_owners).clamp(min=1)


def stds(values: Tensor, index: Tensor, num_owners: int, *, correction: int = 1) -> Tensor:
    """(num_owners,) standard deviations; 0 for an owner of at most `correction` elements."""
    centred = values - means(values, index, num_owners)[index]
    freedom = counts(index, num_owners) - correction
    variances = sums(centred.square(), index, num_owners) / freedom.clamp(min=1)
    return torch.where(freedom > 0, variances, 0).sqrt()


def number_of(groups: Tensor) -> int:
    """Groups that (B,) prompt numbers 0, 1, ... speak of; 0 for none."""
    return int(groups.max()) + 1 if groups.numel() else 0
