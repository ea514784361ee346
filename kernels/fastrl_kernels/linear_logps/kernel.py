"""`linear_logps` as Triton kernels: products with the head whose logits stay on the chip.

`logits_kernel` multiplies tiles of rows with all columns of a split and keeps running statistics
of the float32 result; it writes the logits only for an engine that wants them.
`slice_gradients_kernel` makes a slice of logits again and writes their gradients. Both take rows by
index, as many as a counter on the device says: programs past it return at once, so no row without
work costs any.
S selected tokens, D hidden, V vocabulary without padding, R rows of a chunk, r rank of the adapter.
"""

import triton
import triton.language as tl

from fastrl_kernels.running_softmax import (
    add_tile,
    logit_gradient,
    merge_sums,
    start_sums,
    store_sums,
    transform_logits,
)


@triton.jit
def logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, low_rank_ptr, lora_b_ptr, token, slot, row_mask, columns,
    column_mask, hidden_size, rank, hidden_stride, weight_stride, low_rank_stride, lora_b_stride,
    lora_scale, temperature, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_LORA: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_V) float32 logits over temperature."""
    d = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + token[:, None] * hidden_stride + d[None, :]
    weight_ptrs = weight_ptr + columns[None, :].to(tl.int64) * weight_stride + d[:, None]
    z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, hidden_size, BLOCK_D):
        inside = start + d < hidden_size
        h = tl.load(hidden_ptrs, row_mask[:, None] & inside[None, :], 0.0)
        w = tl.load(weight_ptrs, column_mask[None, :] & inside[:, None], 0.0)
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision="ieee")
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    if HAS_LORA:
        r = tl.arange(0, BLOCK_R)
        low_ptrs = low_rank_ptr + slot[:, None] * low_rank_stride + r[None, :]
        b_ptrs = lora_b_ptr + columns[None, :].to(tl.int64) * lora_b_stride + r[:, None]
        for start in range(0, rank, BLOCK_R):
            inside = start + r < rank
            low = tl.load(low_ptrs + start, row_mask[:, None] & inside[None, :], 0.0)
            b = tl.load(b_ptrs + start, column_mask[None, :] & inside[:, None], 0.0)
            z = tl.dot(lora_scale * low.to(tl.float32), b.to(tl.float32), z, input_precision="ieee")
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, column_mask, 0.0).to(tl.float32)[None, :]
    return transform_logits(
        z, bias, temperature[:, None], logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )


@triton.jit(do_not_specialize=["first_split"], do_not_specialize_on_alignment=["count_ptr"])
def logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, low_rank_ptr, lora_b_ptr, row_ids_ptr, count_ptr,
    target_ids_ptr, temperatures_ptr, logits_ptr, sums_ptr, num_rows, num_columns, first_column,
    tiles_per_split, first_split, hidden_size, rank, hidden_stride, weight_stride, low_rank_stride,
    lora_b_stride, logits_stride, lora_scale, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_LORA: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Statistics, and where STORE the logits, of some rows over the columns of one split.

    The weight, bias and lora_b begin at first_column; num_columns of it carry probability.
    """
    count = tl.load(count_ptr)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    slot = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    row_mask = slot < count
    token = tl.load(row_ids_ptr + slot, row_mask, 0)
    targets = tl.load(target_ids_ptr + token, row_mask, 0) - first_column
    temperature = tl.load(temperatures_ptr + token, row_mask, 1.0)
    m, s, sx, s2, s3, target_z, top = start_sums(BLOCK_M)
    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(num_columns, BLOCK_V))
    for tile in range(split * tiles_per_split, last_tile):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        column_mask = columns < num_columns
        z = logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, low_rank_ptr, lora_b_ptr, token, slot, row_mask,
            columns, column_mask, hidden_size, rank, hidden_stride, weight_stride, low_rank_stride,
            lora_b_stride, lora_scale, temperature, logit_scale, softcap, HAS_BIAS, HAS_LORA,
            HAS_SOFTCAP, BLOCK_M, BLOCK_V, BLOCK_D, BLOCK_R, UPCAST,
        )  # fmt: skip
        z = tl.where(column_mask[None, :], z, -float("inf"))
        if STORE:
            # One wide base and narrow offsets: wide ones for every element would spill.
            base = logits_ptr + tl.program_id(0).to(tl.int64) * BLOCK_M * logits_stride
            offsets = tl.arange(0, BLOCK_M)[:, None] * logits_stride + columns[None, :]
            out = base + first_column + offsets
            tl.store(out, z, row_mask[:, None] & column_mask[None, :])
        m, s, sx, s2, s3, target_z, top = add_tile(
            m, s, sx, s2, s3, target_z, top, z, columns, targets
        )
    top += first_column
    store_sums(
        sums_ptr, first_split + split, slot, num_rows, row_mask, m, s, sx, s2, s3, target_z, top
    )


@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def statistics_kernel(
    sums_ptr, row_ids_ptr, count_ptr, logps_ptr, entropies_ptr, lse_ptr, sum_p2_ptr, sum_p3_ptr,
    argmax_ids_ptr, residuals_ptr, num_rows, num_splits, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row and write its statistics where the row belongs."""
    slot = tl.program_id(0).to(tl.int64)
    if slot >= tl.load(count_ptr):
        return
    token = tl.load(row_ids_ptr + slot)
    logp, entropy, lse, sum_p2, sum_p3, top, residual = merge_sums(
        sums_ptr, slot, num_rows, num_splits, BLOCK_SPLITS
    )
    tl.store(logps_ptr + token, logp)
    tl.store(entropies_ptr + token, entropy)
    tl.store(lse_ptr + token, lse)
    tl.store(sum_p2_ptr + token, sum_p2)
    tl.store(sum_p3_ptr + token, sum_p3)
    tl.store(argmax_ids_ptr + token, top.to(tl.int64))
    tl.store(residuals_ptr + token, residual)


@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def slice_gradients_kernel(
    hidden_ptr, weight_ptr, bias_ptr, low_rank_ptr, lora_b_ptr, row_ids_ptr, count_ptr,
    target_ids_ptr, temperatures_ptr, logp_slopes_ptr, entropy_slopes_ptr, logps_ptr,
    entropies_ptr, lse_ptr, residuals_ptr, unit_ptr, gradients_ptr, num_columns, first_column,
    hidden_size, rank, hidden_stride,
    weight_stride, low_rank_stride, lora_b_stride, gradients_stride, lora_scale, logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr, HAS_LORA: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of a slice of logits in units of *unit_ptr, (R, num_columns) in the input dtype."""
    count = tl.load(count_ptr)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    slot = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = slot < count
    token = tl.load(row_ids_ptr + slot, row_mask, 0)
    targets = tl.load(target_ids_ptr + token, row_mask, 0) - first_column
    temperature = tl.load(temperatures_ptr + token, row_mask, 1.0)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    column_mask = columns < num_columns
    z = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, low_rank_ptr, lora_b_ptr, token, slot, row_mask, columns,
        column_mask, hidden_size, rank, hidden_stride, weight_stride, low_rank_stride,
        lora_b_stride, lora_scale, temperature, logit_scale, softcap, HAS_BIAS, HAS_LORA,
        HAS_SOFTCAP, BLOCK_M, BLOCK_V, BLOCK_D, BLOCK_R, UPCAST,
    )  # fmt: skip
    factor = logit_scale / (temperature * tl.load(unit_ptr))
    gradient = logit_gradient(
        z, columns[None, :] == targets[:, None],
        tl.load(logp_slopes_ptr + token, row_mask, 0.0)[:, None],
        tl.load(entropy_slopes_ptr + token, row_mask, 0.0)[:, None],
        tl.load(logps_ptr + token, row_mask, 0.0)[:, None],
        tl.load(entropies_ptr + token, row_mask, 0.0)[:, None],
        tl.load(lse_ptr + token, row_mask, 0.0)[:, None],
        tl.load(residuals_ptr + token, row_mask, 0.0)[:, None],
        factor[:, None], temperature[:, None], softcap, HAS_SOFTCAP,
    )  # fmt: skip
    out = gradients_ptr + slot[:, None] * gradients_stride + columns[None, :]
    tl.store(out, gradient, row_mask[:, None] & column_mask[None, :])
