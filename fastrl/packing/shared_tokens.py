"""Trained tokens that several completions share, as one row at the head.

Legend: S trained tokens, U distinct rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class DistinctRows:
    """The distinct rows among S rows at the head; `distinct_rows` finds them."""

    source_index: Tensor  # (U,) int64: the packed position whose hidden state predicts the token
    target_ids: Tensor  # (U,) int64
    index: Tensor  # (S,) int64: the distinct row of each trained token
    order: Tensor  # (S,) int64: trained tokens by their rows, each row's in the caller's order
    counts: Tensor  # (U,) int64: trained tokens of each row

    def spread(self, values: Tensor) -> Tensor:
        """(S,) the value of each trained token from (U,) values of rows; differentiable.

        Its gradient adds up the tokens of a row one after another: the same bits on every run.
        """
        _check_length(values, len(self.counts), "distinct row")
        return _Spread.apply(values, self)

    def total(self, values: Tensor) -> Tensor:
        """(U,) sums over the trained tokens of each row, of (S,) values."""
        _check_length(values, len(self.index), "trained token")
        by_row = values.index_select(0, self.order)
        return torch.segment_reduce(by_row, "sum", lengths=self.counts, unsafe=True)

    def first(self, values: Tensor) -> Tensor:
        """(U,) the value of the first trained token of each row, of (S,) values."""
        _check_length(values, len(self.index), "trained token")
        return values.index_select(0, self.order[self.counts.cumsum(0) - self.counts])


def distinct_rows(
    source_index: Tensor, target_ids: Tensor, kinds: Tensor | None = None
) -> DistinctRows:
    """Tokens with the same source and target as one row; of several `kinds` (S,), if given, as one
    row for each. The rows lie in the order of their sources.
    """
    keys = source_index * (target_ids.max() + 1) + target_ids
    if kinds is not None:
        _check_length(kinds, len(keys), "trained token")
        keys = keys * (kinds.max() + 1) + kinds
    keys, order = keys.sort(stable=True)
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    rows = is_first.cumsum(0) - 1
    first = order[is_first]
    return DistinctRows(
        source_index=source_index[first],
        target_ids=target_ids[first],
        index=torch.empty_like(order).index_copy_(0, order, rows),
        order=order,
        counts=torch.bincount(rows),
    )


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: DistinctRows) -> Tensor:
        ctx.rows = rows
        return values.index_select(0, rows.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.total(grad), None


def _check_length(values: Tensor, length: int, what: str) -> None:
    if values.shape != (length,):
        raise ValueError(f"expected one value per {what}, ({length},), got {tuple(values.shape)}")
