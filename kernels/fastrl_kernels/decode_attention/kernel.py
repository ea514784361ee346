"""`decode_attention` as Triton kernels: a softmax in parts of the columns, and their merge.

A program has a tile of queries, one key head, and SPLIT columns of the prefix that these queries
share or of one row's suffix. It leaves weighted values, the largest score and the sum of weights,
which the last kernel adds up in the order of the columns. What a row gets depends on the number of
its tokens and on nothing else, so its bits are the same in every batch.
R rows, P groups, H query heads, h of them share a key head, K head size of queries and keys, Kv of
values, T tiles of BLOCK_M queries, X parts of SPLIT columns.
"""

import triton
import triton.language as tl

from fastrl_kernels.segment_attention.kernel import LOG2E, add_keys


@triton.jit(do_not_specialize=["num_rows"])
def tiles_kernel(
    row_groups_ptr, tiles_ptr, num_rows, num_sharing, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    """tiles (T, 4) int32: group, its first row, first query of the tile, queries from there on.

    A group's tiles begin at start * h // BLOCK_M + group, whatever groups there are before it. So a
    few tiles have no queries; none is left out.
    """
    group = tl.program_id(0)
    start, end = 0, 0
    for first in range(0, num_rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        found = tl.load(row_groups_ptr + row, row < num_rows, 2147483647)
        start += tl.sum((found < group).to(tl.int32))
        end += tl.sum((found <= group).to(tl.int32))
    first_tile = start * num_sharing // BLOCK_M + group
    end_tile = end * num_sharing // BLOCK_M + group + 1
    for tile in range(first_tile, end_tile):
        offset = (tile - first_tile) * BLOCK_M
        ptr = tiles_ptr + 4 * tile
        tl.store(ptr, group)
        tl.store(ptr + 1, start)
        tl.store(ptr + 2, offset)
        tl.store(ptr + 3, tl.maximum((end - start) * num_sharing - offset, 0))


@triton.jit
def tile_of(
    tiles_ptr, prefix_lengths_ptr, suffix_length, num_sharing, IS_PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Entry of the keys and their tokens; first row, first query from there, number of queries."""
    tile = tl.program_id(0)
    if IS_PREFIX:
        entry = tl.load(tiles_ptr + 4 * tile)
        row, offset = tl.load(tiles_ptr + 4 * tile + 1), tl.load(tiles_ptr + 4 * tile + 2)
        count = tl.load(tiles_ptr + 4 * tile + 3)
        length = tl.load(prefix_lengths_ptr + entry)
    else:
        per_row = (num_sharing + BLOCK_M - 1) // BLOCK_M
        row, offset = tile // per_row, tile % per_row * BLOCK_M
        entry, count, length = row, num_sharing - offset, suffix_length
    return entry, length, row + offset // num_sharing, offset % num_sharing, count


@triton.jit(do_not_specialize=["num_rows", "first_part", "suffix_length", "window"])
def parts_kernel(
    q_ptr, k_ptr, v_ptr, tiles_ptr, prefix_lengths_ptr, suffix_length_ptr, values_ptr, largest_ptr,
    sums_ptr, num_rows, num_heads, num_sharing, first_part, suffix_length, window, q_stride,
    q_head_stride, k_entry_stride, k_head_stride, k_stride, v_entry_stride, v_head_stride, v_stride,
    scale, softcap,
    IS_PREFIX: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """values (X, R, H, Kv), largest and sums (X, R, H), all float32, of one part of each row.

    largest is in units of log 2, and -inf where a part has no token that is seen; its values are
    not written then. suffix_length counts unless there is a pointer to it.
    """
    if suffix_length_ptr is not None:
        suffix_length = tl.load(suffix_length_ptr)
    entry, length, row, offset, count = tile_of(
        tiles_ptr, prefix_lengths_ptr, suffix_length, num_sharing, IS_PREFIX, BLOCK_M
    )
    kv_head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    # A tile is at most BLOCK_M rows from its first one: offsets from there are narrow.
    index = offset + tl.arange(0, BLOCK_M)
    local_row, head = index // num_sharing, index % num_sharing
    wanted = tl.arange(0, BLOCK_M) < count
    column = tl.arange(0, BLOCK_K)
    q_ptr += row.to(tl.int64) * q_stride + kv_head * num_sharing * q_head_stride
    q_ptrs = q_ptr + (local_row * q_stride + head * q_head_stride)[:, None] + column[None, :]
    q = tl.load(q_ptrs, wanted[:, None] & (column < HEAD_SIZE)[None, :], 0.0)
    k_ptr += entry.to(tl.int64) * k_entry_stride + kv_head * k_head_stride
    v_ptr += entry.to(tl.int64) * v_entry_stride + kv_head * v_head_stride

    first_seen = 0
    if HAS_WINDOW:
        total = length + suffix_length if IS_PREFIX else length
        first_seen = tl.maximum(total - window, 0)
    begin = tl.maximum(part * SPLIT, first_seen // BLOCK_N * BLOCK_N)
    end = tl.where(count > 0, tl.minimum(length, (part + 1) * SPLIT), 0)
    accumulated = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    s = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        visible = (key >= first_seen) & (key < end)
        accumulated, m, s = add_keys(
            accumulated, m, s, q, k_ptr, v_ptr, tl.cast(start, tl.int64), end - start, k_stride,
            v_stride, visible[None, :], scale, softcap, False, HAS_SOFTCAP, HEAD_SIZE, VALUE_SIZE,
            BLOCK_K, BLOCK_V, BLOCK_N, UPCAST,
        )  # fmt: skip

    first = ((first_part + part).to(tl.int64) * num_rows + row) * num_heads + kv_head * num_sharing
    local = local_row * num_heads + head
    tl.store(largest_ptr + first + local, m, wanted)
    tl.store(sums_ptr + first + local, s, wanted)
    value_column = tl.arange(0, BLOCK_V)
    ptrs = values_ptr + first * VALUE_SIZE + (local * VALUE_SIZE)[:, None] + value_column[None, :]
    written = wanted & (m > -float("inf"))
    tl.store(ptrs, accumulated, written[:, None] & (value_column < VALUE_SIZE)[None, :])


@triton.jit(do_not_specialize=["num_queries", "num_parts"])
def merge_kernel(
    values_ptr, largest_ptr, sums_ptr, sinks_ptr, out_ptr, num_queries, num_heads, num_parts,
    HAS_SINKS: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out (R, H, Kv) from the parts of all R * H queries, in order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted = index < num_queries
    column = tl.arange(0, BLOCK_V)
    m = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    s = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + index % num_heads, wanted, 0.0)
        m, s = sinks.to(tl.float32) * LOG2E, s + 1.0
    accumulated = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    offsets = index[:, None] * VALUE_SIZE + column[None, :]
    for _ in range(num_parts):
        part_m = tl.load(largest_ptr + index, wanted, -float("inf"))
        part_s = tl.load(sums_ptr + index, wanted, 0.0)
        has_part = part_m > -float("inf")
        mask = has_part[:, None] & (column < VALUE_SIZE)[None, :]
        values = tl.load(values_ptr + offsets, mask, 0.0)
        new_m = tl.maximum(m, part_m)
        # Nothing seen so far: any finite number keeps exp2(-inf - it) at 0 instead of NaN.
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        factor, part_factor = tl.exp2(m - shift), tl.exp2(part_m - shift)
        accumulated = accumulated * factor[:, None] + values * part_factor[:, None]
        s = s * factor + part_s * part_factor
        m = new_m
        largest_ptr += num_queries
        sums_ptr += num_queries
        values_ptr += num_queries.to(tl.int64) * VALUE_SIZE
    out = accumulated / s[:, None]
    tl.store(out_ptr + offsets, out, wanted[:, None] & (column < VALUE_SIZE)[None, :])
