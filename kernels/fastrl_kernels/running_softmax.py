"""Device functions: statistics of a softmax that pass over the logits once, and their gradient.

A row's statistics in progress are seven numbers: the largest logit m, the sums of e, e x, e^2 and
e^3 with e = exp(x) and x = z - m, the target's logit, and the column of m. They are kept for every
split of the vocabulary and merged in the order of the splits, so the bits do not depend on how many
programs run. All logits are over temperature, -inf in columns that carry no probability.
"""

import triton
import triton.language as tl

NUM_SUMS = tl.constexpr(7)


@triton.jit
def start_sums(BLOCK_M: tl.constexpr):
    """The seven numbers of BLOCK_M rows before their first logit."""
    zeros = tl.zeros([BLOCK_M], tl.float32)
    return zeros - float("inf"), zeros, zeros, zeros, zeros, zeros, zeros


@triton.jit
def add_tile(m, s, sx, s2, s3, target_z, top, z, columns, targets):
    """The seven numbers (BLOCK_M,) after a tile z (BLOCK_M, BLOCK_V) of consecutive columns."""
    target_z += tl.sum(tl.where(columns[None, :] == targets[:, None], z, 0.0), 1)
    tile_max = tl.max(z, 1)
    tile_top = tl.min(tl.where(z == tile_max[:, None], columns[None, :], 2147483647), 1)
    top = tl.where(tile_max > m, tile_top.to(tl.float32), top)
    new_m = tl.maximum(m, tile_max)
    # Nothing but -inf so far: any finite number keeps exp(-inf - it) at 0 instead of NaN.
    shift = tl.where(new_m == -float("inf"), 0.0, new_m)
    factor = tl.exp(m - shift)
    moved = tl.where(m == -float("inf"), 0.0, m - shift)
    x = z - shift[:, None]
    e = tl.exp(x)
    sx = factor * (sx + s * moved) + tl.sum(tl.where(e > 0.0, e * x, 0.0), 1)
    s = factor * s + tl.sum(e, 1)
    s2 = factor * factor * s2 + tl.sum(e * e, 1)
    s3 = factor * factor * factor * s3 + tl.sum(e * e * e, 1)
    return new_m, s, sx, s2, s3, target_z, top


@triton.jit
def store_sums(sums_ptr, split, rows, num_rows, mask, m, s, sx, s2, s3, target_z, top):
    """Keep the seven numbers of one split; sums_ptr: (splits, 7, num_rows) float32."""
    ptr = sums_ptr + split.to(tl.int64) * NUM_SUMS * num_rows + rows
    tl.store(ptr, m, mask)
    tl.store(ptr + num_rows, s, mask)
    tl.store(ptr + 2 * num_rows, sx, mask)
    tl.store(ptr + 3 * num_rows, s2, mask)
    tl.store(ptr + 4 * num_rows, s3, mask)
    tl.store(ptr + 5 * num_rows, target_z, mask)
    tl.store(ptr + 6 * num_rows, top, mask)


@triton.jit
def merge_sums(sums_ptr, row, num_rows, num_splits, BLOCK_SPLITS: tl.constexpr):
    """logp, entropy, lse, sum p^2, sum p^3, most likely column, what rounding took from lse."""
    split = tl.arange(0, BLOCK_SPLITS)
    mask = split < num_splits
    ptr = sums_ptr + split.to(tl.int64) * NUM_SUMS * num_rows + row
    m = tl.load(ptr, mask, -float("inf"))
    s = tl.load(ptr + num_rows, mask, 0.0)
    sx = tl.load(ptr + 2 * num_rows, mask, 0.0)
    s2 = tl.load(ptr + 3 * num_rows, mask, 0.0)
    s3 = tl.load(ptr + 4 * num_rows, mask, 0.0)
    target_z = tl.sum(tl.load(ptr + 5 * num_rows, mask, 0.0), 0)
    top = tl.load(ptr + 6 * num_rows, mask, 0.0)
    largest = tl.max(m, 0)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    factor = tl.exp(m - shift)
    moved = tl.where(m == -float("inf"), 0.0, m - shift)
    total_x = tl.sum(factor * (sx + s * moved), 0)
    total = tl.sum(factor * s, 0)
    sum_p2 = tl.sum(factor * factor * s2, 0) / (total * total)
    sum_p3 = tl.sum(factor * factor * factor * s3, 0) / (total * total * total)
    log_total = tl.log(total)
    entropy = log_total - total_x / total
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    winner = tl.min(tl.where(m == largest, top, float("inf")), 0)
    logp = (target_z - shift) - log_total
    lse = shift + log_total
    return logp, entropy, lse, sum_p2, sum_p3, winner, (shift - lse) + log_total


@triton.jit
def logit_gradient(
    z, is_target, slope, entropy_slope, logp, entropy, lse, residual, factor, temperature, softcap,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """d loss / d logit before temperature, softcap and scale; factor: logit_scale / temperature.

    The target's own logp is exact where p is nearly 1 and the gradient nearly 0.
    """
    log_p = tl.where(is_target, logp, (z - lse) - residual)
    p = tl.exp(log_p)
    inner = slope + tl.where(p > 0.0, entropy_slope * (log_p + entropy), 0.0)
    gradient = (tl.where(is_target, slope, 0.0) - p * inner) * factor
    if HAS_SOFTCAP:
        capped = z * temperature / softcap
        gradient *= 1.0 - capped * capped
    return gradient


@triton.jit
def tanh(x):
    """Through exp, which never overflows here."""
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def transform_logits(
    z, bias, temperature, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """Logits over temperature from products with the head; bias and temperature broadcast."""
    if HAS_BIAS:
        z += bias
    z *= logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z / temperature
