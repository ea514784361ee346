"""The fix-up between the products of `policy_loss`, as one Triton kernel.

S selected tokens, V vocabulary without padding, R rows of a chunk.
"""

import triton
import triton.language as tl

from fastrl_kernels.running_softmax import logit_gradient, merge_sums
from fastrl_kernels.token_loss.kernel import load_or, token_loss


@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def fix_up_kernel(
    sums_ptr, logits_ptr, gradients_ptr, row_ids_ptr, count_ptr, target_ids_ptr, temperatures_ptr,
    advantages_ptr, weights_ptr, old_logps_ptr, ref_logps_ptr, rollout_weights_ptr, values_ptr,
    logps_ptr, entropies_ptr, lse_ptr, residuals_ptr, slopes_ptr, entropy_slopes_ptr, clipped_ptr,
    parameters, num_rows, num_splits, num_columns, logits_stride, gradients_stride, logit_scale,
    softcap,
    SURROGATE: tl.constexpr, REGULARISERS: tl.constexpr, INPUTS: tl.constexpr,
    STRIDES: tl.constexpr, OFFSETS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GRADIENTS: tl.constexpr,
    DENSE: tl.constexpr, IS_RAW: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics, loss and slopes of one row; then its logits become their gradients in place.

    gradients_ptr is logits_ptr in the dtype of the hidden states: a row of gradients takes the
    first half of its own logits. Rows without slopes stay as they are, or become zero where DENSE.
    IS_RAW: the logits are still without scale and temperature.
    """
    slot = tl.program_id(0).to(tl.int64)
    counts = slot < tl.load(count_ptr)
    if (not DENSE) and (not counts):
        return
    token = tl.load(row_ids_ptr + slot)
    slope, entropy_slope, logp, entropy, lse, residual = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if counts:
        logp, entropy, lse, _sum_p2, _sum_p3, _top, residual = merge_sums(
            sums_ptr, slot, num_rows, num_splits, BLOCK_SPLITS
        )
        old_logp = load_or(old_logps_ptr, token, True, logp, HAS_OLD)
        ref_logp = load_or(ref_logps_ptr, token, True, logp, HAS_REF)
        rollout_weight = load_or(rollout_weights_ptr, token, True, 1.0, HAS_ROLLOUT)
        value, slope, clipped, entropy_coef = token_loss(
            logp, old_logp, ref_logp, tl.load(advantages_ptr + token), rollout_weight, parameters,
            token, True, SURROGATE, REGULARISERS, INPUTS, STRIDES, OFFSETS,
        )  # fmt: skip
        weight = tl.load(weights_ptr + token)
        slope *= weight
        entropy_slope = -entropy_coef * weight
        tl.store(values_ptr + token, weight * (value - entropy_coef * entropy))
        tl.store(logps_ptr + token, logp)
        tl.store(entropies_ptr + token, entropy)
        tl.store(lse_ptr + token, lse)
        tl.store(residuals_ptr + token, residual)
        tl.store(slopes_ptr + token, slope)
        tl.store(entropy_slopes_ptr + token, entropy_slope)
        tl.store(clipped_ptr + token, clipped)
    active = (slope != 0.0) | (entropy_slope != 0.0)
    if (not GRADIENTS) or ((not DENSE) and (not active)):
        return
    write_gradients(
        logits_ptr + slot * logits_stride, gradients_ptr + slot * gradients_stride,
        tl.load(target_ids_ptr + token), active, slope, entropy_slope, logp, entropy, lse, residual,
        tl.load(temperatures_ptr + token), logit_scale, softcap, 1.0, num_columns, HAS_SOFTCAP,
        IS_RAW, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def gradients_kernel(
    logits_ptr, gradients_ptr, row_ids_ptr, count_ptr, target_ids_ptr, temperatures_ptr,
    slopes_ptr, entropy_slopes_ptr, logps_ptr, entropies_ptr, lse_ptr, residuals_ptr, unit_ptr,
    num_columns, logits_stride, gradients_stride, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The last part of the fix-up alone: float16 has to see all slopes before it picks a unit."""
    slot = tl.program_id(0).to(tl.int64)
    if slot >= tl.load(count_ptr):
        return
    token = tl.load(row_ids_ptr + slot)
    slope = tl.load(slopes_ptr + token)
    entropy_slope = tl.load(entropy_slopes_ptr + token)
    if (slope == 0.0) and (entropy_slope == 0.0):
        return
    write_gradients(
        logits_ptr + slot * logits_stride, gradients_ptr + slot * gradients_stride,
        tl.load(target_ids_ptr + token), True, slope, entropy_slope,
        tl.load(logps_ptr + token), tl.load(entropies_ptr + token), tl.load(lse_ptr + token),
        tl.load(residuals_ptr + token),
        tl.load(temperatures_ptr + token), logit_scale, softcap, tl.load(unit_ptr), num_columns,
        HAS_SOFTCAP, False, BLOCK_V,
    )  # fmt: skip


@triton.jit
def write_gradients(
    logits, gradients, target, active, slope, entropy_slope, logp, entropy, lse, residual,
    temperature, logit_scale, softcap, unit, num_columns, HAS_SOFTCAP: tl.constexpr,
    IS_RAW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of one row of logits, over the first half of the same memory; zero if inactive."""
    factor = logit_scale / (temperature * unit)
    for start in range(0, num_columns, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        mask = columns < num_columns
        z = tl.load(logits + columns, mask, 0.0)
        if IS_RAW:
            z = z * logit_scale / temperature
        gradient = logit_gradient(
            z, columns == target, slope, entropy_slope, logp, entropy, lse, residual, factor,
            temperature, softcap, HAS_SOFTCAP,
        )  # fmt: skip
        gradient = tl.where(active, gradient, 0.0)
        # Every thread has read its logits before any of them is overwritten.
        tl.debug_barrier()
        tl.store(gradients + columns, gradient, mask)
