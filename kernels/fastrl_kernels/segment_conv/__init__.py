"""Causal convolution over a forest of segments: a completion starts from its prompt's last rows.

N packed tokens, M segments, D channels, T rows. The row is written out with the context of every
segment before it, so one ordinary convolution serves all; siblings share their parent's rows only.
"""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastrl_kernels.segment_conv.reference import segment_conv_reference
from fastrl_kernels.segments import Segments
from fastrl_kernels.shared_rows import SharedRows, share_rows, take_rows

__all__ = ["segment_conv", "segment_conv_reference"]


def segment_conv(
    x: Tensor, conv: Callable[[Tensor], Tensor], segments: Segments, *, kernel_size: int
) -> Tensor:
    """`conv` along the path of each token, zeros before a root. (N, D).

    x: (N, D). conv: from (T, D) to (T, D), row t made of the `kernel_size` rows up to t; it may add
    a bias and an activation. Context reaches through short and empty segments up to the root.
    """
    if x.dim() != 2 or len(x) != segments.num_tokens:
        raise ValueError(
            f"x must have shape (N, D) with the {segments.num_tokens} tokens of segments, got "
            f"{tuple(x.shape)}; drop the batch dimension and put tokens first"
        )
    if kernel_size < 1:
        raise ValueError(f"kernel_size must be a positive number of rows, got {kernel_size}")
    contexts = _contexts(segments, kernel_size)
    rows = torch.cat([x, take_rows(x, contexts.taken)])  # (N + M * (kernel_size - 1), D)
    return conv(rows.index_select(0, contexts.order)).index_select(0, contexts.own)


class _Contexts(NamedTuple):
    """Where the rows of the written-out row come from, and where the tokens are in it."""

    taken: SharedRows
    """The kernel_size - 1 rows before each segment."""
    order: Tensor
    """Rows of x followed by those taken, each segment behind its context."""
    own: Tensor
    """(N,) int64: the tokens themselves."""


_cache: WeakKeyDictionary[Segments, dict[int, _Contexts]] = WeakKeyDictionary()


def _contexts(segments: Segments, kernel_size: int) -> _Contexts:
    """The tables of a forest; kept for the next layer as long as the forest lives."""
    known = _cache.setdefault(segments, {})
    if kernel_size not in known:
        # Tables made under inference mode could not be saved for the backward of the update.
        with torch.inference_mode(False):
            known[kernel_size] = _make_contexts(segments, kernel_size - 1)
    return known[kernel_size]


def _make_contexts(segments: Segments, size: int) -> _Contexts:
    """size: rows before each segment."""
    host, device, num_tokens = segments.host, segments.lengths.device, segments.num_tokens
    starts, lengths = host.starts.tolist(), host.lengths.tolist()
    last_rows: list[list[int]] = []  # of the path that ends with the segment
    taken: list[int] = []
    for start, length, parent in zip(starts, lengths, host.parents.tolist(), strict=True):
        context = last_rows[parent] if parent >= 0 else [-1] * size
        taken += context
        own_rows = range(start + max(0, length - size), start + length)
        last_rows.append([*context, *own_rows][len(own_rows) :])
    before = size * torch.arange(1, len(lengths) + 1)  # rows of context up to each segment's
    own = torch.arange(num_tokens) + before.repeat_interleave(host.lengths)
    is_context = torch.ones(num_tokens + len(taken), dtype=torch.bool)
    is_context[own] = False
    order = torch.empty(num_tokens + len(taken), dtype=torch.int64)
    order[own] = torch.arange(num_tokens)
    order[is_context] = torch.arange(num_tokens, num_tokens + len(taken))
    return _Contexts(share_rows(taken, device), order.to(device), own.to(device))
