"""`selected_logps` as Triton kernels: logits that already lie in memory, read once each way.

S rows, V vocabulary.
"""

import triton
import triton.language as tl

from fastrl_kernels.running_softmax import logit_gradient, store_sums, transform_logits


@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def stored_logits_kernel(
    logits_ptr, bias_ptr, row_ids_ptr, count_ptr, target_ids_ptr, temperatures_ptr, sums_ptr,
    num_rows, num_columns, logits_stride, logit_scale, softcap,
    BY_SLOT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    REWRITE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics of one row, as one split; REWRITE leaves logits over temperature behind.

    The logits of a row lie at its slot where BY_SLOT, else at its token. Threads keep sums of their
    own and add them up at the end, so that a tile costs one reduction, that of its maximum.
    """
    slot = tl.program_id(0).to(tl.int64)
    if slot >= tl.load(count_ptr):
        return
    token = tl.load(row_ids_ptr + slot)
    row = logits_ptr + (slot if BY_SLOT else token) * logits_stride
    target = tl.load(target_ids_ptr + token)
    temperature = tl.load(temperatures_ptr + token)
    m = -float("inf")
    s = tl.zeros([BLOCK_V], tl.float32)
    sx = tl.zeros([BLOCK_V], tl.float32)
    s2 = tl.zeros([BLOCK_V], tl.float32)
    s3 = tl.zeros([BLOCK_V], tl.float32)
    target_z = tl.zeros([BLOCK_V], tl.float32)
    lane_max = tl.zeros([BLOCK_V], tl.float32) - float("inf")
    lane_top = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        mask = columns < num_columns
        z = tl.load(row + columns, mask, 0.0).to(tl.float32)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + columns, mask, 0.0).to(tl.float32)
        z = transform_logits(z, bias, temperature, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        if REWRITE:
            tl.store(row + columns, z, mask)
        z = tl.where(mask, z, -float("inf"))
        lane_top = tl.where(z > lane_max, columns.to(tl.float32), lane_top)
        lane_max = tl.maximum(lane_max, z)
        target_z += tl.where(columns == target, z, 0.0)
        m, s, sx, s2, s3 = add_lanes(m, s, sx, s2, s3, z)
    top = tl.min(tl.where(lane_max == m, lane_top, float("inf")), 0)
    store_sums(
        sums_ptr, tl.program_id(0) * 0, slot, num_rows, slot < num_rows, m, tl.sum(s, 0),
        tl.sum(sx, 0), tl.sum(s2, 0), tl.sum(s3, 0), tl.sum(target_z, 0), top,
    )  # fmt: skip


@triton.jit
def add_lanes(m, s, sx, s2, s3, z):
    """Sums (BLOCK_V,) of every lane after one more logit each; m: the largest so far, of all."""
    new_m = tl.maximum(m, tl.max(z, 0))
    # Nothing but -inf so far: any finite number keeps exp(-inf - it) at 0 instead of NaN.
    shift = tl.where(new_m == -float("inf"), 0.0, new_m)
    moved = tl.where(m == -float("inf"), 0.0, m - shift)
    factor = tl.exp(m - shift)
    x = z - shift
    e = tl.exp(x)
    sx = factor * (sx + s * moved) + tl.where(e > 0.0, e * x, 0.0)
    s = factor * s + e
    s2 = factor * factor * s2 + e * e
    s3 = factor * factor * factor * s3 + e * e * e
    return new_m, s, sx, s2, s3


@triton.jit
def stored_gradients_kernel(
    logits_ptr, target_ids_ptr, temperatures_ptr, logp_slopes_ptr, entropy_slopes_ptr,
    logps_ptr, entropies_ptr, lse_ptr, residuals_ptr, out_ptr, num_columns, logits_stride,
    out_stride,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits of one row and block of columns; out may be the logits themselves."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = columns < num_columns
    target = tl.load(target_ids_ptr + row)
    temperature = tl.load(temperatures_ptr + row)
    z = tl.load(logits_ptr + row * logits_stride + columns, mask, 0.0).to(tl.float32) / temperature
    gradient = logit_gradient(
        z, columns == target, tl.load(logp_slopes_ptr + row), tl.load(entropy_slopes_ptr + row),
        tl.load(logps_ptr + row), tl.load(entropies_ptr + row), tl.load(lse_ptr + row),
        tl.load(residuals_ptr + row), 1.0 / temperature, temperature, 1.0,
        False,
    )  # fmt: skip
    # An ignored row may hold anything, and 0 times NaN is NaN.
    gradient = tl.where(target < 0, 0.0, gradient)
    tl.store(out_ptr + row * out_stride + columns, gradient, mask)
