"""Segment attention of short paths, many tiles in one product.

A tile of a short path is too little work for a call of its own. Tiles are padded to a few sizes,
and those of one size go through attention together. The sizes of a tile, all multiples of 16,
follow from its own path, and products of such sizes give a tile the same bits in any company.

N packed tokens, M segments, H heads, Hkv key-value heads. B tiles of T tokens and L keys, X = B *
Hkv, R = T * H / Hkv.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.products import TILE, round_up
from fastrl_kernels.segment_attention.forest import Forest
from fastrl_kernels.segment_attention.scores import Options, Rows, attend, slopes_of

MAX_PATH = 96  # tokens of a short path
MAX_TOKENS = 32
MAX_SCORES = 2**18  # of the tiles in one product: 1 MiB of float32, to stay in the cache


class Batch(NamedTuple):
    """B tiles of one size, as places in the packed row."""

    tokens: Tensor  # (B, T) int64; what is beyond a tile's last token repeats its first one
    keys: Tensor  # (B, L) int64, the path in order; beyond its end, the tile's first token
    positions: Tensor  # (B, T) int64, of the tokens on their paths
    places: Tensor  # int64: the real ones among the B * T tokens


def batches(forest: Forest, num_heads: int) -> list[Batch]:
    """The tiles of all segments whose path is short, by size, in products for the cache."""
    lengths, starts, depths = (
        torch.tensor(x, dtype=torch.int64) for x in (forest.lengths, forest.starts, forest.depths)
    )
    is_short = torch.tensor(forest.ends, dtype=torch.int64) <= MAX_PATH
    num_tiles = torch.where(is_short, -(-lengths // MAX_TOKENS), 0)
    segments = torch.arange(len(lengths)).repeat_interleave(num_tiles)
    offsets = MAX_TOKENS * (
        torch.arange(len(segments)) - (num_tiles.cumsum(0) - num_tiles)[segments]
    )
    counts = (lengths[segments] - offsets).clamp(max=MAX_TOKENS)
    firsts = depths[segments] + offsets
    num_keys = firsts + counts
    sizes = torch.stack([_padded(counts), _padded(num_keys)], 1)
    paths = _path_rows(forest, size=round_up(MAX_PATH))
    found = []
    for size in sizes.unique(dim=0):
        tiles = (sizes == size).all(1).nonzero()[:, 0]
        row = (starts[segments] + offsets)[tiles, None]
        token, key = torch.arange(int(size[0])), torch.arange(int(size[1]))
        is_token, is_key = token < counts[tiles, None], key < num_keys[tiles, None]
        offset = torch.where(is_token, token, 0)
        count = max(1, MAX_SCORES // (num_heads * len(token) * len(key)))
        parts = zip(
            (row + offset).split(count),
            torch.where(is_key, paths[segments[tiles], : len(key)], row).split(count),
            (firsts[tiles, None] + offset).split(count),
            is_token.split(count),
            strict=True,
        )
        found += [Batch(*part[:3], part[3].flatten().nonzero()[:, 0]) for part in parts]
    return found


def _padded(sizes: Tensor) -> Tensor:
    """The next multiples of TILE."""
    return -(-sizes // TILE) * TILE


def _path_rows(forest: Forest, size: int) -> Tensor:
    """(M, size) int64: where the tokens of each segment's path lie in the packed row.

    What is beyond a path's end is meaningless, and so are the rows of paths longer than `size`.
    """
    position = torch.arange(size)
    rows = torch.zeros(len(forest.lengths), size, dtype=torch.int64)
    starts, depths = torch.tensor(forest.starts), torch.tensor(forest.depths)
    for level in forest.levels():
        segments = torch.tensor(level)
        depth = depths[segments, None]
        above = rows[torch.tensor([max(forest.parents[segment], 0) for segment in level])]
        own = starts[segments, None] + position - depth
        rows[segments] = torch.where(position < depth, above, own)
    return rows


def forward_(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, tiles: list[Batch],
    options: Options,
) -> None:  # fmt: skip
    """Write the (N, H, Kv) outputs of the tokens on short paths."""
    for batch in tiles:
        rows = _rows(q, k, v, sinks, batch, options)
        _write(out, batch, rows, attend(rows, options))


def backward_(
    q_grad: Tensor, k_total: Tensor, v_total: Tensor, sinks_total: Tensor,
    grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    tiles: list[Batch], options: Options,
) -> None:  # fmt: skip
    """Write q_grad of the tokens on short paths, and add to the totals, which hold sums."""
    for batch in tiles:
        rows = _rows(q, k, v, sinks, batch, options)
        grads_out = _queries(grad_out, batch, k.shape[1])
        is_padding = torch.ones(batch.tokens.numel(), dtype=torch.bool, device=q.device)
        is_padding[batch.places] = False
        is_padding = is_padding.view(len(batch.tokens), 1, -1, 1, 1)
        rows.by_token(grads_out).masked_fill_(is_padding, 0)
        slopes = slopes_of(rows, _queries(out, batch, k.shape[1]), grads_out, options)
        _add(v_total, batch, torch.bmm(slopes.probs.mT, grads_out))
        _add(k_total, batch, torch.bmm(slopes.scores.mT, rows.queries).mul_(options.scale))
        _write(q_grad, batch, rows, torch.bmm(slopes.scores, rows.keys).mul_(options.scale))
        if slopes.sinks is not None:
            sinks_total += slopes.sinks


def _rows(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, batch: Batch, options: Options
) -> Rows:
    num_tiles, num_tokens = batch.tokens.shape
    return Rows(
        _queries(q, batch, k.shape[1]), _keys(k, batch), _keys(v, batch), num_tiles, num_tokens,
        sinks, functools.partial(_hide, batch=batch, window=options.window),
    )  # fmt: skip


def _hide(scores: Tensor, batch: Batch, window: int | None) -> None:
    """scores: (B, Hkv, T, H / Hkv, L)."""
    key = torch.arange(batch.keys.shape[1], device=scores.device)
    distance = batch.positions[:, :, None] - key
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    scores.masked_fill_(hidden[:, None, :, None], -torch.inf)


def _queries(x: Tensor, batch: Batch, num_kv_heads: int) -> Tensor:
    """(X, R, size) of the tiles' tokens, from (N, H, size), in the dtype of sums."""
    (num_tiles, T), size = batch.tokens.shape, x.shape[2]
    rows = x.index_select(0, batch.tokens.flatten())
    rows = rows.view(num_tiles, T, num_kv_heads, -1, size).transpose(1, 2)
    return rows.reshape(num_tiles * num_kv_heads, -1, size).to(accumulation_dtype(x.dtype))


def _keys(x: Tensor, batch: Batch) -> Tensor:
    """(X, L, size) of the tiles' paths, from (N, Hkv, size), in the dtype of sums."""
    rows = x.index_select(0, batch.keys.flatten()).view(*batch.keys.shape, *x.shape[1:])
    rows = rows.transpose(1, 2)
    return rows.reshape(-1, *rows.shape[2:]).to(accumulation_dtype(x.dtype))


def _write(x: Tensor, batch: Batch, rows: Rows, values: Tensor) -> None:
    """x[tokens] = values (X, R, size), padding left out."""
    by_token = rows.by_token(values).transpose(1, 2).reshape(-1, *x.shape[1:])
    tokens = batch.tokens.flatten()[batch.places]
    x.index_copy_(0, tokens, by_token.index_select(0, batch.places).to(x.dtype))


def _add(total: Tensor, batch: Batch, values: Tensor) -> None:
    """total[keys] += values (X, L, size), one tile after another."""
    num_kv_heads = total.shape[1]
    by_key = values.view(-1, num_kv_heads, *values.shape[1:]).transpose(1, 2)
    total.index_add_(0, batch.keys.flatten(), by_key.reshape(-1, *total.shape[1:]))
