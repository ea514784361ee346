"""Decode attention in plain PyTorch: products for all prefixes and for all suffixes, one softmax.

The queries of a group lie side by side, so a prefix is read once for all its rows. Where groups
have different numbers of rows they are filled up to the largest with zeros.

R rows, P groups, W rows of the largest, H heads, Hkv key-value heads, h = H / Hkv heads that share
one, K head size of queries and keys, Kv of values, L prefix columns, C suffix columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.products import HALF

COPIED_BYTES = 2**22  # of keys and values at a time, so that their copies stay in the cache


class Options(NamedTuple):
    """Constants of the scores."""

    scale: float
    window: int | None
    softcap: float | None


class Places(NamedTuple):
    """Where each row stands among those of its group."""

    num_groups: int  # P
    width: int  # W
    slots: tuple[Tensor, Tensor] | None
    """(R,) int64 group and place in it of every row; None if rows fill the groups evenly."""

    def by_group(self, x: Tensor) -> Tensor:
        """(R * Hkv, h, size) as (P * Hkv, W * h, size), zero where there is no row."""
        _, num_sharing, size = x.shape
        if self.slots is None:
            table = x.view(self.num_groups, self.width, -1, num_sharing, size).transpose(1, 2)
        else:
            rows = x.view(len(self.slots[0]), -1, num_sharing, size)
            shape = (self.num_groups, rows.shape[1], self.width, num_sharing, size)
            table = x.new_zeros(shape)
            table.transpose(1, 2)[self.slots] = rows
        return table.reshape(-1, self.width * num_sharing, size)

    def by_row(self, x: Tensor, num_sharing: int) -> Tensor:
        """What `by_group` takes from what it makes."""
        table = x.view(self.num_groups, -1, self.width, num_sharing, x.shape[2]).transpose(1, 2)
        rows = table if self.slots is None else table[self.slots]
        return rows.reshape(-1, num_sharing, x.shape[2])


class Prefix(NamedTuple):
    """The columns of the prefixes that some row sees."""

    keys: Tensor  # (P, Hkv, L, K)
    values: Tensor  # (P, Hkv, L, Kv)
    hidden: Tensor | None
    """(P, L) bool: padding, and what is before the window; None if there is neither."""


def grouped_attention(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor,
    row_groups: Tensor, prefix_lengths: Tensor, suffix_length: int, sinks: Tensor | None,
    options: Options,
) -> Tensor:  # fmt: skip
    """(R, H, Kv) outputs; reads the groups and lengths on the host.

    Keys and values of half precision are copied in that of the sums, some groups at a time.
    """
    num_groups, size = prefix_k.shape[0], q.shape[2] + suffix_v.shape[3]
    out = q.new_empty(*q.shape[:2], suffix_v.shape[3])
    if q.shape[0] == 0:
        return out
    counts = counts_of(row_groups, num_groups)
    step = num_groups
    if q.dtype in HALF:
        num_columns = prefix_k.shape[2] + int(counts.max()) * suffix_length
        step = max(1, COPIED_BYTES // (4 * suffix_k.shape[1] * size * num_columns))
    ends = [0, *counts.cumsum(0).tolist()]
    for first in range(0, num_groups, step):
        groups = slice(first, min(first + step, num_groups))
        rows = slice(ends[groups.start], ends[groups.stop])
        if rows.start < rows.stop:
            out[rows] = _attend(
                q[rows], prefix_k[groups], prefix_v[groups], suffix_k[rows], suffix_v[rows],
                places_of(row_groups[rows].long() - first, counts[groups]), prefix_lengths[groups],
                suffix_length, sinks, options,
            )  # fmt: skip
    return out


def _attend(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor,
    places: Places, prefix_lengths: Tensor, suffix_length: int, sinks: Tensor | None,
    options: Options,
) -> Tensor:  # fmt: skip
    """(R, H, Kv) outputs of at least one row."""
    num_rows, num_heads, head_size = q.shape
    dtype, num_kv_heads = accumulation_dtype(q.dtype), suffix_k.shape[1]
    num_sharing = num_heads // num_kv_heads
    prefix = visible_prefix(prefix_k, prefix_v, prefix_lengths, suffix_length, options.window)
    has_prefix = prefix.keys.shape[2] > 0
    first = 0 if options.window is None else max(0, suffix_length - options.window)
    own_keys, own_values = (
        x[:, :, first:suffix_length].to(dtype).flatten(0, 1) for x in (suffix_k, suffix_v)
    )
    queries = q.to(dtype).reshape(-1, num_sharing, head_size)

    # Scores turn into weights where they are: new memory costs a CPU more than a pass over old.
    own = _scores(queries, own_keys, options)
    largest = own.amax(-1, keepdim=True)  # (R * Hkv, h, 1)
    if has_prefix:
        shared = _scores(places.by_group(queries), prefix.keys.to(dtype), options)
        if prefix.hidden is not None:
            by_group = shared.view(prefix.hidden.shape[0], -1, shared.shape[2])
            by_group.masked_fill_(prefix.hidden[:, None], -torch.inf)
        found = places.by_row(shared.amax(-1, keepdim=True), num_sharing)
        largest = torch.maximum(largest, found)
    if sinks is not None:
        sink = sinks.to(dtype).view(num_kv_heads, num_sharing, 1).repeat(num_rows, 1, 1)
        largest = torch.maximum(largest, sink)

    own.sub_(largest).exp_()
    total, out = own.sum(-1, keepdim=True), torch.bmm(own, own_values)
    if has_prefix:
        shared.sub_(places.by_group(largest)).exp_()
        total += places.by_row(shared.sum(-1, keepdim=True), num_sharing)
        out += places.by_row(_weighted(shared, prefix, dtype), num_sharing)
    if sinks is not None:  # takes part in the denominator and has no value
        total += sink.sub_(largest).exp_()
    return out.div_(total).view(num_rows, num_heads, -1)


def counts_of(row_groups: Tensor, num_groups: int) -> Tensor:
    """(P,) int64 rows of every group; groups that decrease or do not exist raise."""
    counts = torch.bincount(row_groups, minlength=num_groups)
    if len(counts) > num_groups or bool((row_groups[1:] < row_groups[:-1]).any()):
        raise ValueError(
            f"row_groups must not decrease and name one of {num_groups} prefixes, got "
            f"{row_groups.tolist()}; sort the rows by group"
        )
    return counts


def places_of(groups: Tensor, counts: Tensor) -> Places:
    """The places of (R,) rows in groups of so many."""
    num_groups, width = len(counts), int(counts.max())
    if len(groups) == num_groups * width:
        return Places(num_groups, width, None)
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(groups), device=groups.device) - starts[groups]
    return Places(num_groups, width, (groups, places))


def visible_prefix(
    keys: Tensor, values: Tensor, lengths: Tensor, suffix_length: int, window: int | None
) -> Prefix:
    """Without the columns that the window hides from all rows."""
    shortest, longest = (int(x) for x in lengths.aminmax())
    num_columns = keys.shape[2]
    if shortest < 0 or longest > num_columns:
        raise ValueError(
            f"prefix_lengths must be from 0 to {num_columns}, the columns of prefix_k, got "
            f"{lengths.tolist()}; count the tokens of each prompt"
        )
    reach = longest if window is None else max(0, window - suffix_length)  # tokens of a prefix
    first = max(0, shortest - reach)
    chosen = slice(first, longest if reach else first)
    hidden = None
    if shortest < longest or reach < longest - first:
        column = torch.arange(first, chosen.stop, device=lengths.device)
        hidden = (column >= lengths[:, None]) | (column < lengths[:, None] - reach)
    return Prefix(keys[:, :, chosen], values[:, :, chosen], hidden)


def _scores(queries: Tensor, keys: Tensor, options: Options) -> Tensor:
    """(X, rows, columns) of queries (X, rows, K) and keys (..., columns, K), X in all."""
    keys = keys.reshape(-1, *keys.shape[-2:])
    scores = queries.new_empty(*queries.shape[:2], keys.shape[1])
    scores.baddbmm_(queries, keys.mT, beta=0, alpha=options.scale)
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_().mul_(options.softcap)
    return scores


def _weighted(probs: Tensor, prefix: Prefix, dtype: torch.dtype) -> Tensor:
    """probs (P * Hkv, W * h, L) times values, whatever hidden values hold."""
    values = prefix.values.to(dtype).reshape(-1, *prefix.values.shape[-2:])
    out = torch.bmm(probs, values)
    if prefix.hidden is None or bool(out.isfinite().all()):
        return out
    # Hidden columns have probability 0, and 0 times NaN is NaN; a copy without is rarely needed.
    clean = prefix.values.to(dtype).masked_fill(prefix.hidden[:, None, :, None], 0)
    return torch.bmm(probs, clean.flatten(0, 1))
