"""The objective of many tokens in one Triton launch: values, slopes, and sums for the metrics."""

import triton
import triton.language as tl


@triton.jit
def token_loss(
    logp, old_logp, ref_logp, advantage, rollout_weight, hyper, beta, SURROGATE: tl.constexpr,
    REGULARISER: tl.constexpr,
):  # fmt: skip
    """Loss, slope and whether the surrogate stopped the token; scalars or blocks alike."""
    gain, gain_slope = SURROGATE(logp, old_logp, advantage, *hyper)
    clipped = (gain_slope == 0.0) & (advantage != 0.0)
    value = -rollout_weight * gain
    slope = -rollout_weight * gain_slope
    if REGULARISER is not None:
        penalty, penalty_slope = REGULARISER(logp, ref_logp)
        value += beta * penalty
        slope += beta * penalty_slope
    return value, slope, clipped


@triton.jit
def token_losses_kernel(
    logps_ptr, entropies_ptr, old_logps_ptr, ref_logps_ptr, rollout_weights_ptr, advantages_ptr,
    weights_ptr, slopes_ptr, entropy_slopes_ptr, clipped_ptr, sums_ptr, hyper, beta, entropy_coef,
    num_tokens,
    SURROGATE: tl.constexpr, REGULARISER: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_ROLLOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for all tokens: slopes of each, and the eight sums of `TokenSums`.

    A hundred thousand tokens are a few megabytes; a second launch would cost as much as the loop.
    """
    loss_sum = tl.zeros([BLOCK], tl.float32)
    count_sum = tl.zeros([BLOCK], tl.float32)
    high_sum = tl.zeros([BLOCK], tl.float32)
    low_sum = tl.zeros([BLOCK], tl.float32)
    entropy_sum = tl.zeros([BLOCK], tl.float32)
    old_kl_sum = tl.zeros([BLOCK], tl.float32)
    ref_kl_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = token < num_tokens
        weight = tl.load(weights_ptr + token, mask, 0.0)
        counts = weight != 0.0
        logp = tl.load(logps_ptr + token, counts, 0.0)
        entropy = tl.load(entropies_ptr + token, counts, 0.0)
        advantage = tl.load(advantages_ptr + token, counts, 0.0)
        old_logp = logp
        if HAS_OLD:
            old_logp = tl.load(old_logps_ptr + token, counts, 0.0)
        ref_logp = logp
        if HAS_REF:
            ref_logp = tl.load(ref_logps_ptr + token, counts, 0.0)
        rollout_weight = tl.zeros([BLOCK], tl.float32) + 1.0
        if HAS_ROLLOUT:
            rollout_weight = tl.load(rollout_weights_ptr + token, counts, 0.0)
        value, slope, clipped = token_loss(
            logp, old_logp, ref_logp, advantage, rollout_weight, hyper, beta, SURROGATE, REGULARISER
        )
        # A token without weight may hold anything, and 0 times NaN is NaN.
        loss_sum += tl.where(counts, weight * (value - entropy_coef * entropy), 0.0)
        tl.store(slopes_ptr + token, tl.where(counts, weight * slope, 0.0), mask)
        tl.store(entropy_slopes_ptr + token, -entropy_coef * weight, mask)
        clipped = clipped & counts
        tl.store(clipped_ptr + token, clipped, mask)
        count_sum += counts.to(tl.float32)
        high_sum += (clipped & (advantage > 0.0)).to(tl.float32)
        low_sum += (clipped & (advantage < 0.0)).to(tl.float32)
        entropy_sum += entropy
        old_kl_sum += k3(logp, old_logp)
        ref_kl_sum += k3(logp, ref_logp)
    tl.store(sums_ptr, tl.sum(loss_sum, 0))
    tl.store(sums_ptr + 1, tl.sum(count_sum, 0))
    tl.store(sums_ptr + 2, tl.sum(high_sum, 0))
    tl.store(sums_ptr + 3, tl.sum(low_sum, 0))
    tl.store(sums_ptr + 4, tl.sum(entropy_sum, 0))
    tl.store(sums_ptr + 5, tl.sum(old_kl_sum, 0))
    tl.store(sums_ptr + 6, tl.sum(ref_kl_sum, 0))


@triton.jit
def k3(logp, ref_logp):
    """exp(-d) - 1 + d with d = logp - ref_logp within +-20, as objectives.k3."""
    delta = tl.minimum(tl.maximum(logp - ref_logp, -20.0), 20.0)
    return tl.exp(-delta) - 1.0 + delta
