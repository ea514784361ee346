"""Segment attention along one path at a time: cost and memory follow the visible pairs.

Siblings have their places on one path in turn. So a buffer as long as the longest path holds, in
order and in one piece, the keys that a segment sees, and each token is copied into it once.
Backward goes through the segments in the opposite order; the gradient of an ancestor gathers in
such a buffer, in the dtype of sums, until all below it is done.

No tile holds tokens of two segments, so the bits of a segment's outputs depend on its path alone.
The price is a fixed cost for each segment, however short it is; short paths go another way.

N packed tokens, M segments, H heads, Hkv key-value heads, K head size of queries and keys, Kv of
values. A tile has T consecutive tokens of one segment, R = T * H / Hkv rows for each key-value
head, and L keys.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.products import round_up
from fastrl_kernels.segment_attention import short_paths
from fastrl_kernels.segment_attention.forest import Forest, forest_of
from fastrl_kernels.segment_attention.scores import Options, Rows, attend, slopes_of

MAX_SCORES = 2**18  # of a tile with more than MIN_TOKENS: 1 MiB of float32, to stay in the cache
MIN_TOKENS, MAX_TOKENS = 16, 64  # of a tile; a long one computes more that causality hides


class Tile(NamedTuple):
    """T consecutive tokens of a segment, and L tokens of their path."""

    tokens: slice  # of the row
    keys: slice  # of the path; the last T are the tokens themselves

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start


class Tables(NamedTuple):
    """What the loops go through, the same for all layers of a model."""

    forest: Forest
    short: list[short_paths.Batch]


class Gradients(NamedTuple):
    """In the shapes and dtypes of the inputs; that of the sinks is empty if there are none."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor


def tables_of(lengths: Tensor, parents: Tensor, num_heads: int, device: torch.device) -> Tables:
    """The tables of these (M,) lengths and parents; those of the last few forests are kept."""
    as_bytes = (x.cpu().numpy().tobytes() for x in (lengths, parents))
    return _tables(*as_bytes, num_heads, device)


@functools.lru_cache(maxsize=4)
def _tables(lengths: bytes, parents: bytes, num_heads: int, device: torch.device) -> Tables:
    forest = forest_of(*(memoryview(x).cast("q").tolist() for x in (lengths, parents)))
    short = short_paths.batches(forest, num_heads)
    return Tables(forest, [short_paths.Batch(*(x.to(device) for x in batch)) for batch in short])


class Path:
    """Some (N, Hkv, size) tensors along one path at a time, in the dtype of sums."""

    def __init__(self, tensors: tuple[Tensor, ...], forest: Forest) -> None:
        self.tensors, self.forest = tensors, forest
        # Rounded up, or what else is in the row would decide how the rows of a head are aligned.
        longest = round_up(max(forest.ends, default=0))
        self.buffers = [
            x.new_zeros(x.shape[1], longest, x.shape[2], dtype=accumulation_dtype(x.dtype))
            for x in tensors
        ]  # (Hkv, longest path, size)
        self.is_entered = [False] * len(forest.lengths)

    def enter(self, segment: int) -> None:
        """Copy in what is missing of the path to the end of this segment.

        In preorder as in its reverse, what was once copied is there for as long as it is needed.
        """
        while segment >= 0 and not self.is_entered[segment]:
            tokens, positions = self.places(segment)
            for buffer, x in zip(self.buffers, self.tensors, strict=True):
                buffer[:, positions] = x[tokens].transpose(0, 1)
            self.is_entered[segment] = True
            segment = self.forest.parents[segment]

    def seen_by(self, tile: Tile) -> list[Tensor]:
        """(Hkv, L, size) views of the buffers."""
        return [buffer[:, tile.keys] for buffer in self.buffers]

    def take(self, segment: int) -> None:
        """Move the rows of this segment out to the tensors, and leave zeros for its siblings."""
        tokens, positions = self.places(segment)
        for buffer, x in zip(self.buffers, self.tensors, strict=True):
            x[tokens] = buffer[:, positions].transpose(0, 1).to(x.dtype)
            buffer[:, positions] = 0

    def places(self, segment: int) -> tuple[slice, slice]:
        """The segment in the row, and on its path."""
        start, depth, length = (
            x[segment] for x in (self.forest.starts, self.forest.depths, self.forest.lengths)
        )
        return slice(start, start + length), slice(depth, depth + length)


def tiles(forest: Forest, segment: int, num_heads: int, window: int | None) -> Iterator[Tile]:
    """The tiles of one segment, by a rule that knows nothing but its path; none of a short one."""
    start, depth, length = (x[segment] for x in (forest.starts, forest.depths, forest.lengths))
    if depth + length <= short_paths.MAX_PATH:
        return
    num_keys = depth + length if window is None else min(depth + length, window + MAX_TOKENS)
    size = MAX_SCORES // max(num_heads * num_keys, 1)
    size = min(max(size, MIN_TOKENS), MAX_TOKENS)
    for first in range(0, length, size):
        end = min(first + size, length)
        seen = 0 if window is None else max(0, depth + first - window + 1)
        yield Tile(slice(start + first, start + end), slice(seen, depth + end))


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, tables: Tables, options: Options
) -> Tensor:
    """(N, H, Kv) outputs."""
    forest = tables.forest
    out = q.new_empty(*q.shape[:2], v.shape[2])
    short_paths.forward_(out, q, k, v, sinks, tables.short, options)
    path = Path((k, v), forest)
    for segment in range(len(forest.lengths)):
        for tile in tiles(forest, segment, q.shape[1], options.window):
            path.enter(segment)
            rows = _tile_rows(q, path, tile, sinks, options)
            _write_rows(out, tile, attend(rows, options))
    return out


def backward(
    grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    tables: Tables, options: Options,
) -> Gradients:  # fmt: skip
    """Gradients of `forward`, whose scores are computed again; every sum has a fixed order."""
    forest = tables.forest
    dtype = accumulation_dtype(q.dtype)
    path = Path((k, v), forest)
    totals = Path((torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)), forest)
    k_total, v_total = totals.tensors
    sinks_total = q.new_zeros(0 if sinks is None else q.shape[1], dtype=dtype)
    q_grad = torch.empty_like(q)
    for segment in reversed(range(len(forest.lengths))):
        for tile in tiles(forest, segment, q.shape[1], options.window):
            path.enter(segment)
            rows = _tile_rows(q, path, tile, sinks, options)
            outs, grads_out = (_rows_of(x, tile, k.shape[1]) for x in (out, grad_out))
            slopes = slopes_of(rows, outs, grads_out, options)
            keys, values = totals.seen_by(tile)
            values.baddbmm_(slopes.probs.mT, grads_out)
            keys.baddbmm_(slopes.scores.mT, rows.queries, alpha=options.scale)
            _write_rows(q_grad, tile, torch.bmm(slopes.scores, rows.keys).mul_(options.scale))
            if slopes.sinks is not None:
                sinks_total += slopes.sinks
        if path.is_entered[segment]:
            totals.take(segment)
    short_paths.backward_(
        q_grad, k_total, v_total, sinks_total, grad_out, out, q, k, v, sinks, tables.short, options
    )  # fmt: skip
    sinks_dtype = dtype if sinks is None else sinks.dtype
    return Gradients(q_grad, k_total.to(k.dtype), v_total.to(v.dtype), sinks_total.to(sinks_dtype))


def _tile_rows(q: Tensor, path: Path, tile: Tile, sinks: Tensor | None, options: Options) -> Rows:
    keys, values = path.seen_by(tile)
    hide = functools.partial(_hide, tile=tile, window=options.window)
    queries = _rows_of(q, tile, keys.shape[0])
    return Rows(queries, keys, values, 1, tile.num_tokens, sinks, hide)


def _hide(scores: Tensor, tile: Tile, window: int | None) -> None:
    """Put -inf on what tokens of the tile do not see; scores: (1, Hkv, T, H / Hkv, L).

    That is later tokens of the tile, and keys that the window has left by the token's turn: both
    lie within a square of T keys, at the one end of the keys and at the other.
    """
    size = tile.num_tokens
    hidden = scores.new_full((size, size), -torch.inf)
    scores[..., -size:].add_(hidden.triu(1)[:, None])
    first = tile.keys.stop - size
    if window is not None and tile.keys.stop - tile.keys.start > window:
        left = first - window + 1 - tile.keys.start
        scores[..., :size].add_(hidden.tril(left - 1)[:, None])


def _rows_of(x: Tensor, tile: Tile, num_kv_heads: int) -> Tensor:
    """(Hkv, R, size) rows of the tile in the dtype of sums, from (N, H, size)."""
    num_tokens, num_heads, size = tile.num_tokens, *x.shape[1:]
    grouped = x[tile.tokens].view(num_tokens, num_kv_heads, -1, size).transpose(0, 1)
    # A new tensor always: the place of the tile in x would decide how its rows are aligned.
    rows = x.new_empty(grouped.shape, dtype=accumulation_dtype(x.dtype)).copy_(grouped)
    return rows.view(num_kv_heads, num_tokens * num_heads // num_kv_heads, size)


def _write_rows(x: Tensor, tile: Tile, rows: Tensor) -> None:
    """The reverse of `_rows_of`."""
    grouped = rows.view(rows.shape[0], tile.num_tokens, -1, rows.shape[2]).transpose(0, 1)
    x[tile.tokens].view(grouped.shape).copy_(grouped)
