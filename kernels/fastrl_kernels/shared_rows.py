"""Rows of a tensor that several others continue, and the sum of what comes back to each of them.

R rows, E of them taken. Gathering is easy forwards; backwards PyTorch adds the gradients of a row
that was taken more than once in whatever order they come, and in their own dtype. Here they are
added one after another, in the order they were taken, in float32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.head import accumulation_dtype


class SharedRows(NamedTuple):
    """Which rows are taken, and who took each of them; `share_rows` builds it."""

    taken: Tensor
    """(E,) int64: the row taken, -1 for a row of zeros."""
    sources: Tensor
    """(U,) int64: the rows that were taken at all, the most popular first."""
    takers: tuple[Tensor, ...]
    """Entry r: the taker number r of every source that has as many, in the order of `sources`."""


def share_rows(index: Sequence[int], device: torch.device) -> SharedRows:
    """The tables for taking the rows `index`, where -1 stands for zeros."""
    takers: dict[int, list[int]] = {}
    for taker, source in enumerate(index):
        if source >= 0:
            takers.setdefault(source, []).append(taker)
    by_popularity = sorted(takers.items(), key=lambda item: -len(item[1]))
    most = len(by_popularity[0][1]) if by_popularity else 0

    def as_tensor(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    return SharedRows(
        taken=as_tensor(index),
        sources=as_tensor([source for source, _ in by_popularity]),
        takers=tuple(
            as_tensor([who[rank] for _, who in by_popularity if len(who) > rank])
            for rank in range(most)
        ),
    )


def take_rows(x: Tensor, rows: SharedRows) -> Tensor:
    """(E, ...) rows of x (R, ...), zeros where the index is -1; the same bits on every run."""
    return _TakeRows.apply(x, rows)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: SharedRows) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        out = x.index_select(0, rows.taken.clamp(min=0))
        blank = (rows.taken < 0).view(-1, *[1] * (x.dim() - 1))
        return out.masked_fill_(blank, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sources, takers = ctx.rows.sources, ctx.rows.takers
        total = grad.new_zeros((len(sources), *ctx.shape[1:]), dtype=accumulation_dtype(grad.dtype))
        for who in takers:
            total[: len(who)] += grad.index_select(0, who)
        grad_x = grad.new_zeros(ctx.shape)
        return grad_x.index_copy_(0, sources, total.to(grad.dtype)), None


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], for index (S,) int64 with repetitions; the same gradient on every run.

    On a CPU indexing adds the gradients of a repeated row in the order in which threads come, on a
    GPU `index_select` does.
    """
    return x[index] if x.is_cuda else x.index_select(0, index)
