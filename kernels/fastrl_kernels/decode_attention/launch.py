"""`decode_attention` on a GPU: what the kernels are launched with.

No number is read from the device, so the four launches can be captured in a CUDA graph.
R rows, P groups, H query heads, h of them share a key head, K head size of queries and keys, Kv of
values, L prefix columns, C suffix columns, T tiles, X parts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.decode_attention.grouped import Options
from fastrl_kernels.decode_attention.kernel import merge_kernel, parts_kernel, tiles_kernel
from fastrl_kernels.implementation import interprets_triton
from fastrl_kernels.launch import cdiv, power_of_2, upcast
from fastrl_kernels.products import HALF

LARGEST_STRIDE = 2**23  # elements between rows or columns: offsets inside a tile are below 2^31
SPLIT = 256  # columns of a part; fixed, so that bits do not depend on the batch
INTERPRETED_SPLIT = 32  # several parts in the short rows of tests
ROWS_OF_A_TILE = 8  # of a usual group, whose queries then read a prefix once
MERGED = 4  # queries that a program merges
GROUP_BLOCK = 1024  # rows whose groups are counted at a time


class Tile(NamedTuple):
    """Shape of a tile of scores, and how many threads work on it."""

    queries: int
    """At most."""
    columns: int
    num_warps: int
    """Of up to 32 queries; twice as many of more."""
    num_stages: int
    max_registers: int | None = None
    """Of a thread, where the assembler would take fewer and spill; None: its own choice."""

    def threads(self, num_queries: int) -> dict[str, int]:
        """The launch's own keywords."""
        num_warps = self.num_warps * (2 if num_queries > 32 else 1)
        threads = {"num_warps": num_warps, "num_stages": self.num_stages}
        return threads if self.max_registers is None else {**threads, "maxnreg": self.max_registers}


# By the larger head size: the largest tiles whose registers and shared memory suffice on sm_80,
# sm_90, sm_100 and sm_120 without spills (benchmarks/kernel_resources.py); not yet tuned on a
# device. Without tensor cores more queries in a tile save nothing.
HALF_TILES = {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 2, 255)}
WIDE_TILES = {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1, 128)}
INTERPRETED_TILE = Tile(32, 16, 4, 1)


class Parts(NamedTuple):
    """What is left of parts of rows; all float32."""

    values: Tensor  # (X, R, H, Kv)
    largest: Tensor  # (X, R, H)
    sums: Tensor  # (X, R, H)


def tile_of(dtype: torch.dtype, head_size: int) -> Tile:
    """Fixed for a model, so that bits do not depend on the batch."""
    if interprets_triton():
        return INTERPRETED_TILE
    tiles = HALF_TILES if dtype in HALF else WIDE_TILES
    return tiles[max(64, power_of_2(head_size))]


def tile_queries(tile: Tile, num_sharing: int, *, is_prefix: bool) -> int:
    """Queries of a tile: of some rows for a prefix, of one for a suffix; products need 16."""
    rows = ROWS_OF_A_TILE if is_prefix else 1
    return min(tile.queries, max(16, power_of_2(rows * num_sharing)))


def split_columns() -> int:
    """Columns of one part."""
    return INTERPRETED_SPLIT if interprets_triton() else SPLIT


def forward(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor,
    row_groups: Tensor, prefix_lengths: Tensor, suffix_length: int,
    suffix_length_on_device: Tensor | None, sinks: Tensor | None, options: Options,
) -> Tensor:  # fmt: skip
    """(R, H, Kv) outputs. suffix_length: at least that of the tensor, if there is one."""
    num_rows, num_heads, _ = q.shape
    value_size, num_sharing = suffix_v.shape[3], num_heads // suffix_k.shape[1]
    out = q.new_empty(num_rows, num_heads, value_size)
    if not out.numel():
        return out
    q = q if q.stride(2) == 1 and max(q.stride()) < LARGEST_STRIDE else q.contiguous()
    num_shared, num_own = (cdiv(x, split_columns()) for x in (prefix_k.shape[2], suffix_length))
    sizes = (num_shared + num_own, num_rows, num_heads)
    parts = Parts(
        out.new_empty(*sizes, value_size, dtype=torch.float32),
        *(out.new_empty(sizes, dtype=torch.float32) for _ in range(2)),
    )
    lengths = (prefix_lengths, suffix_length_on_device, suffix_length)
    tile = tile_of(q.dtype, max(q.shape[2], value_size))
    if num_shared:
        size = tile_queries(tile, num_sharing, is_prefix=True)
        tiles = make_tiles(row_groups, prefix_k.shape[0], num_sharing, size)
        grid = (tiles.shape[0], prefix_k.shape[1], num_shared)
        _parts(grid, q, prefix_k, prefix_v, tiles, lengths, parts, 0, options)
    per_row = cdiv(num_sharing, tile_queries(tile, num_sharing, is_prefix=False))
    grid = (num_rows * per_row, suffix_k.shape[1], num_own)
    _parts(grid, q, suffix_k, suffix_v, None, lengths, parts, num_shared, options)
    num_queries = num_rows * num_heads
    merge_kernel[(cdiv(num_queries, MERGED),)](
        *parts, sinks, out, num_queries, num_heads, num_shared + num_own,
        HAS_SINKS=sinks is not None, VALUE_SIZE=value_size, BLOCK_V=_block(value_size),
        BLOCK_M=MERGED,
    )  # fmt: skip
    return out


def make_tiles(row_groups: Tensor, num_groups: int, num_sharing: int, size: int) -> Tensor:
    """(T, 4) int32: tiles of `size` queries that share a prefix; T follows from shapes alone."""
    num_rows = row_groups.shape[0]
    tiles = row_groups.new_empty(num_rows * num_sharing // size + num_groups, 4)
    tiles_kernel[(num_groups,)](
        row_groups.contiguous(), tiles, num_rows, num_sharing, BLOCK_M=size, BLOCK=GROUP_BLOCK
    )
    return tiles


def _parts(
    grid: tuple[int, int, int], q: Tensor, k: Tensor, v: Tensor, tiles: Tensor | None,
    lengths: tuple[Tensor, Tensor | None, int], parts: Parts, first_part: int, options: Options,
) -> None:  # fmt: skip
    """Parts of the prefixes, in tiles, or of the suffixes, row by row."""
    num_rows, num_heads, head_size = q.shape
    value_size, num_sharing = v.shape[3], num_heads // k.shape[1]
    tile = tile_of(q.dtype, max(head_size, value_size))
    num_queries = tile_queries(tile, num_sharing, is_prefix=tiles is not None)
    constants: dict[str, Any] = {
        "IS_PREFIX": tiles is not None,
        "HAS_SOFTCAP": options.softcap is not None,
        "HAS_WINDOW": options.window is not None,
        "HEAD_SIZE": head_size,
        "VALUE_SIZE": value_size,
        "BLOCK_K": _block(head_size),
        "BLOCK_V": _block(value_size),
        "BLOCK_M": num_queries,
        "BLOCK_N": tile.columns,
        "SPLIT": split_columns(),
        **upcast(),
    }
    prefix_lengths, length_on_device, suffix_length = lengths
    parts_kernel[grid](
        q, k, v, tiles, prefix_lengths.contiguous(), length_on_device, *parts, num_rows, num_heads,
        num_sharing, first_part, suffix_length, options.window or 0, *q.stride()[:2],
        *k.stride()[:3], *v.stride()[:3], float(options.scale), float(options.softcap or 1.0),
        **constants, **tile.threads(num_queries),
    )  # fmt: skip


def check_readable(**tensors: Tensor) -> None:
    """Raise ValueError unless the kernels can read keys and values where they are."""
    for name, x in tensors.items():
        if x.numel() and (x.stride(3) != 1 or x.stride(2) >= LARGEST_STRIDE):
            raise ValueError(
                f"{name} must have the elements of a head side by side and columns at most "
                f"{LARGEST_STRIDE} elements apart, got strides {x.stride()}; store it so, or use "
                'implementation="torch"'
            )


def _block(size: int) -> int:
    """Columns that cover a head; products need at least 16."""
    return max(16, power_of_2(size))
