"""Triton kernels: products of logit gradients with the head and the hidden states.

Of a chunk of R rows of logit gradients only those that `slots` lists count, and how many those are
is a number on the device: loops over rows end there, and blocks of rows past it do no work. So rows
without a gradient cost nothing, and nobody waits to learn how many there are. All gradients come in
units of *unit_ptr, a power of two that keeps them in the range of float16, and leave without it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.chunks import Inputs
from fastrl_kernels.launch import Rows, cdiv, head_tiles, hidden_blocks, power_of_2, upcast

COLUMN_BLOCK = 128


@triton.jit
def write_total(
    out, row_mask, first, width, total, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write or add a tile (ROWS, COLUMNS), from column `first` on; out: (ROWS,) pointers to rows.

    In two halves: the whole of what is there and the whole of what comes do not fit in registers.
    """
    halves = tl.permute(tl.reshape(total, [ROWS, 2, COLUMNS // 2]), (0, 2, 1))
    left, right = tl.split(halves)
    for half in tl.static_range(2):
        part = left if half == 0 else right
        d = first + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        ptrs = out[:, None] + d[None, :]
        mask = row_mask[:, None] & (d < width)[None, :]
        if ACCUMULATE:
            part += tl.load(ptrs, mask, 0.0).to(tl.float32)
        tl.store(ptrs, part, mask)


@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def hidden_gradients_kernel(
    gradients_ptr, weight_ptr, slots_ptr, count_ptr, unit_ptr, out_ptr, num_rows, num_columns,
    hidden_size, columns_per_split, gradients_stride, weight_stride, out_stride,
    ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out[split, place] = gradients[slots[place]] W over the columns of one split.

    out: (splits, R, D) float32; every element is written, zero past the count.
    """
    count = tl.load(count_ptr)
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2).to(tl.int64)
    row_mask = place < count
    slot = tl.load(slots_ptr + place, row_mask, 0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d_mask = d < hidden_size
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if tl.program_id(0) * BLOCK_M < count:
        first = split * columns_per_split
        last = tl.minimum(first + columns_per_split, num_columns)
        for start in range(first, last, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            inside = column < last
            g = tl.load(
                gradients_ptr + slot[:, None] * gradients_stride + column[None, :],
                row_mask[:, None] & inside[None, :], 0.0,
            )  # fmt: skip
            w = tl.load(
                weight_ptr + column[:, None].to(tl.int64) * weight_stride + d[None, :],
                inside[:, None] & d_mask[None, :], 0.0,
            )  # fmt: skip
            if UPCAST or g.dtype != w.dtype:
                g, w = g.to(tl.float32), w.to(tl.float32)
            total = tl.dot(g, w, total, input_precision="ieee")
        total *= tl.load(unit_ptr)
    out = out_ptr + split * num_rows * out_stride + place * out_stride
    first = tl.program_id(1) * BLOCK_N
    write_total(out, place < num_rows, first, hidden_size, total, ACCUMULATE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def weight_gradients_kernel(
    gradients_ptr, rows_ptr, slots_ptr, row_ids_ptr, count_ptr, unit_ptr, out_ptr, num_columns,
    width, scale, gradients_stride, rows_stride, out_stride,
    ACCUMULATE: tl.constexpr, BY_TOKEN: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (+)= scale * gradients[slots]^T rows, (V, width), summed over the rows that count.

    rows: hidden states of all tokens, found through row_ids where BY_TOKEN; else one a slot.
    """
    count = tl.load(count_ptr)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    column_mask = column < num_columns
    d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d_mask = d < width
    total = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        inside = place < count
        slot = tl.load(slots_ptr + place, inside, 0).to(tl.int64)
        row = slot
        if BY_TOKEN:
            row = tl.load(row_ids_ptr + slot, inside, 0)
        g = tl.load(
            gradients_ptr + slot[None, :] * gradients_stride + column[:, None],
            column_mask[:, None] & inside[None, :], 0.0,
        )  # fmt: skip
        x = tl.load(
            rows_ptr + row[:, None] * rows_stride + d[None, :],
            inside[:, None] & d_mask[None, :], 0.0,
        )  # fmt: skip
        if UPCAST:
            g, x = g.to(tl.float32), x.to(tl.float32)
        total = tl.dot(g.to(x.dtype), x, total, input_precision="ieee")
    total *= scale * tl.load(unit_ptr)
    out = out_ptr + column.to(tl.int64) * out_stride
    first = tl.program_id(0) * BLOCK_N
    write_total(out, column_mask, first, width, total, ACCUMULATE, BLOCK_V, BLOCK_N)


@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def column_sums_kernel(
    gradients_ptr, slots_ptr, count_ptr, unit_ptr, out_ptr, num_columns, gradients_stride,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out += the sum of gradients[slots], (V,): the gradient of the bias."""
    count = tl.load(count_ptr)
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = column < num_columns
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, count, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        inside = place < count
        slot = tl.load(slots_ptr + place, inside, 0).to(tl.int64)
        g = tl.load(
            gradients_ptr + slot[:, None] * gradients_stride + column[None, :],
            inside[:, None] & mask[None, :], 0.0,
        )  # fmt: skip
        total += tl.sum(g.to(tl.float32), 0)
    total *= tl.load(unit_ptr)
    tl.store(out_ptr + column, tl.load(out_ptr + column, mask, 0.0) + total, mask)


@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def active_slots_kernel(
    row_ids_ptr, count_ptr, logp_slopes_ptr, entropy_slopes_ptr, slots_ptr, active_count_ptr,
    num_rows, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All slots, those of the first *count_ptr with a gradient first; then how many those are."""
    slot = tl.arange(0, BLOCK)
    inside = slot < num_rows
    mask = slot < tl.load(count_ptr)
    token = tl.load(row_ids_ptr + slot, mask, 0)
    active = tl.load(logp_slopes_ptr + token, mask, 0.0) != 0.0
    if HAS_ENTROPY:
        active = active | (tl.load(entropy_slopes_ptr + token, mask, 0.0) != 0.0)
    active = active & mask
    idle = inside & (active == 0)
    num_active = tl.sum(active.to(tl.int32), 0)
    place = tl.cumsum(active.to(tl.int32), 0) - 1
    idle_place = num_active + tl.cumsum(idle.to(tl.int32), 0) - 1
    tl.store(slots_ptr + tl.where(active, place, idle_place), slot, inside)
    tl.store(active_count_ptr, num_active)


class Gathered(NamedTuple):
    """Logit gradients of a chunk, and which of its rows have one."""

    gradients: Tensor  # (R, columns) in the dtype of the hidden states, rows of any stride
    slots: Tensor  # (R,) int32, those with a gradient first
    num_rows: Tensor  # (1,) int32: how many have
    unit: Tensor  # (1,) float32: what the gradients are multiples of


def active_slots(
    row_ids: Tensor, count: Tensor, logp_slopes: Tensor, entropy_slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Slots of a chunk with the active ones first, (R,) int32, and their number, (1,) int32."""
    num_rows = row_ids.shape[0]
    slots = torch.empty(num_rows, dtype=torch.int32, device=row_ids.device)
    active_count = torch.empty(1, dtype=torch.int32, device=row_ids.device)
    active_slots_kernel[(1,)](
        row_ids, count, logp_slopes, entropy_slopes, slots, active_count, num_rows,
        HAS_ENTROPY=entropy_slopes is not None, BLOCK=power_of_2(num_rows),
    )  # fmt: skip
    return slots, active_count


def add_hidden_gradients(out: Tensor, chunk: Gathered, weight: Tensor, *, is_first: bool) -> None:
    """out (splits, R, D) float32 by place in slots: += gradients W, or = if it is the first."""
    num_splits, num_rows, hidden_size = out.shape
    num_columns = weight.shape[0]
    is_mixed = weight.dtype != chunk.gradients.dtype
    dtype = torch.float32 if is_mixed else weight.dtype
    blocks = hidden_blocks(dtype, weight.device, num_columns)
    grid = (cdiv(num_rows, blocks.rows), cdiv(hidden_size, blocks.columns), num_splits)
    per_split = cdiv(cdiv(num_columns, num_splits), blocks.depth) * blocks.depth
    hidden_gradients_kernel[grid](
        chunk.gradients, weight, chunk.slots, chunk.num_rows, chunk.unit, out, num_rows,
        num_columns, hidden_size, per_split, chunk.gradients.stride(0), weight.stride(0),
        out.stride(1),
        ACCUMULATE=not is_first, BLOCK_M=blocks.rows, BLOCK_N=blocks.columns,
        BLOCK_V=blocks.depth, **upcast(), **blocks.threads,
    )  # fmt: skip


def adapted_rows(inputs: Inputs, rows: Rows) -> Tensor | None:
    """(R, r) float32: hidden states after half of the adapter, the same bits for any R."""
    lora_a = inputs.head.lora_a
    if lora_a is None:
        return None
    hidden = inputs.hidden_states
    out = hidden.new_empty(1, rows.ids.shape[0], lora_a.shape[0], dtype=torch.float32)
    one = torch.ones(1, dtype=torch.float32, device=hidden.device)
    chunk = Gathered(hidden, rows.ids, rows.num_rows, one)
    add_hidden_gradients(out, chunk, lora_a.T.contiguous(), is_first=True)
    return out[0]


def add_weight_gradients(
    out: Tensor, chunk: Gathered, rows: Tensor, row_ids: Tensor | None, *, scale: float = 1.0
) -> None:
    """out (columns, width) += scale * gradients^T rows; rows: by slot, or by token with row_ids."""
    num_columns, width = out.shape
    blocks = head_tiles(rows.dtype, rows.device).weight_gradients
    # All of the width at a time: gradients come from memory once, and rows stay in the cache.
    grid = (cdiv(width, blocks.columns), cdiv(num_columns, blocks.rows))
    weight_gradients_kernel[grid](
        chunk.gradients, rows, chunk.slots, row_ids, chunk.num_rows, chunk.unit, out, num_columns,
        width, scale, chunk.gradients.stride(0), rows.stride(0), out.stride(0),
        ACCUMULATE=True, BY_TOKEN=row_ids is not None, BLOCK_V=blocks.rows,
        BLOCK_N=blocks.columns, BLOCK_M=blocks.depth, **upcast(), **blocks.threads,
    )  # fmt: skip


def add_column_sums(out: Tensor, chunk: Gathered) -> None:
    """out (columns,) float32 += the gradients of all rows that count."""
    column_sums_kernel[(cdiv(out.shape[0], COLUMN_BLOCK),)](
        chunk.gradients, chunk.slots, chunk.num_rows, chunk.unit, out, out.shape[0],
        chunk.gradients.stride(0), BLOCK_V=COLUMN_BLOCK, BLOCK_M=16,
    )  # fmt: skip


def unit_of(slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """(1,) the power of two near the largest slope: float16 ends where weights of 1e-5 begin."""
    if dtype != torch.float16:
        return torch.ones(1, dtype=torch.float32, device=slopes.device)
    largest = slopes.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.floor(torch.log2(largest)))[None]
