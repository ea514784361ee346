"""Order of the completions inside their groups.

Legend: B completions, P prompts, G completions of the largest group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.ragged import counts, number_of


def ranks(values: Tensor, groups: Tensor) -> Tensor:
    """(B,) int64 place of each value in its group: 0 is the largest, ties go to the lower index."""
    by_value = torch.argsort(values, descending=True, stable=True)
    order = by_value[torch.argsort(groups[by_value], stable=True)]
    sizes = counts(groups, number_of(groups))
    starts = sizes.cumsum(0) - sizes
    places = torch.arange(groups.numel(), device=groups.device) - starts[groups[order]]
    return torch.empty_like(groups).scatter(0, order, places)


def alike(values: Tensor, groups: Tensor) -> Tensor:
    """(P,) bool: whether all values of a group are the same number; False for an empty group."""
    order = torch.argsort(groups, stable=True)
    sizes = counts(groups, number_of(groups))
    largest = torch.segment_reduce(values[order], "max", lengths=sizes)
    smallest = torch.segment_reduce(values[order], "min", lengths=sizes)
    return (sizes > 0) & (largest == smallest)


def largest_spread(values: Tensor, groups: Tensor, num_kept: int) -> Tensor:
    """(B,) bool: the num_kept values of each group whose variance is the largest possible.

    They are always the k largest and the num_kept - k smallest for some k (PODS,
    arXiv:2504.13818), so sorting and running sums find them. Where several k are equally good,
    up to rounding, the largest k wins: a group of equal values keeps its first num_kept. A group
    with fewer values keeps them all.
    """
    if groups.numel() == 0:
        return torch.zeros_like(groups, dtype=torch.bool)
    places = ranks(values, groups)
    sizes = counts(groups, number_of(groups))
    kept = sizes.clamp(max=num_kept)
    tops = _best_split(_table(values, groups, places, sizes), sizes, kept)
    is_top = places < tops[groups]
    is_bottom = places >= (sizes - kept + tops)[groups]
    return is_top | is_bottom


def _table(values: Tensor, groups: Tensor, places: Tensor, sizes: Tensor) -> Tensor:
    """(P, G) float64 values in descending order above the smallest of their group, 0 beyond it."""
    table = torch.zeros((len(sizes), int(sizes.max())), dtype=torch.float64, device=values.device)
    table[groups, places] = values.double()
    smallest = table.gather(1, (sizes - 1).clamp(min=0)[:, None])
    exists = torch.arange(table.shape[1], device=values.device) < sizes[:, None]
    return torch.where(exists, table - smallest, 0)


def _best_split(table: Tensor, sizes: Tensor, kept: Tensor) -> Tensor:
    """(P,) int64 number of values to keep from the top; kept minus that many from the bottom."""
    tops = torch.arange(int(kept.max()) + 1, device=table.device).expand(len(sizes), -1)
    below = sizes[:, None] - (kept[:, None] - tops).clamp(min=0)

    def sums_of_split(terms: Tensor) -> Tensor:
        running = torch.nn.functional.pad(terms.cumsum(1), (1, 0))
        return running.gather(1, tops) + running[:, -1:] - running.gather(1, below)

    squares = sums_of_split(table.square())
    spreads = squares - sums_of_split(table).square() / kept.clamp(min=1)[:, None]
    possible = tops <= kept[:, None]
    largest = torch.where(possible, spreads, -torch.inf).amax(dim=1, keepdim=True)
    rounding = 1e-12 * table.square().sum(dim=1, keepdim=True)
    return torch.where(possible & (spreads >= largest - rounding), tops, 0).amax(dim=1)
