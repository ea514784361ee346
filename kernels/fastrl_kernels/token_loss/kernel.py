"""The objective of many tokens in one Triton launch: values, slopes, and sums for the metrics."""

import triton
import triton.language as tl


@triton.jit
def read_parameters(
    parameters, token, mask, STRIDES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr
):
    """Parameters FIRST to LAST of an objective for a token or a block of them, as a tuple."""
    values = ()
    for index in tl.static_range(FIRST, LAST):
        if STRIDES[index] < 0:
            values = values + (parameters[index],)
        else:
            values = values + (tl.load(parameters[index] + token * STRIDES[index], mask, 0.0),)
    return values


@triton.jit
def load_or(ptr, token, mask, default, HAS_VALUES: tl.constexpr):
    """Values of a token or a block of them; `default` where there is no tensor."""
    values = default
    if HAS_VALUES:
        values = tl.load(ptr + token, mask, 0.0)
    return values


@triton.jit
def token_loss(
    logp, old_logp, ref_logp, advantage, rollout_weight, parameters, token, mask,
    SURROGATE: tl.constexpr, REGULARISERS: tl.constexpr, INPUTS: tl.constexpr,
    STRIDES: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Loss without the entropy, slope, whether the surrogate stopped the token, entropy_coef.

    Scalars or blocks alike.
    """
    own = read_parameters(parameters, token, mask, STRIDES, 0, OFFSETS[0])
    gain, gain_slope = SURROGATE(logp, old_logp, advantage, *own)
    clipped = (gain_slope == 0.0) & (advantage != 0.0)
    value = -rollout_weight * gain
    slope = -rollout_weight * gain_slope
    for index in tl.static_range(len(REGULARISERS)):
        own = read_parameters(parameters, token, mask, STRIDES, OFFSETS[index], OFFSETS[index + 1])
        # The order is that of REGULARISER_INPUTS.
        if INPUTS[index] == 0:
            penalty, penalty_slope = REGULARISERS[index](logp, ref_logp, *own[1:])
        elif INPUTS[index] == 1:
            penalty, penalty_slope = REGULARISERS[index](logp, old_logp, *own[1:])
        else:
            penalty, penalty_slope = REGULARISERS[index](logp, old_logp, ref_logp, *own[1:])
        value += own[0] * penalty
        slope += own[0] * penalty_slope
    entropy_coef = read_parameters(parameters, token, mask, STRIDES, len(STRIDES) - 1, len(STRIDES))
    return value, slope, clipped, entropy_coef[0]


@triton.jit
def token_losses_kernel(
    logps_ptr, entropies_ptr, old_logps_ptr, ref_logps_ptr, rollout_weights_ptr, advantages_ptr,
    weights_ptr, slopes_ptr, entropy_slopes_ptr, clipped_ptr, loss_ptr, metrics_ptr, parameters,
    num_tokens,
    SURROGATE: tl.constexpr, REGULARISERS: tl.constexpr, INPUTS: tl.constexpr,
    STRIDES: tl.constexpr, OFFSETS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr, BLOCK: tl.constexpr, NUM_SUMS: tl.constexpr,
):  # fmt: skip
    """One program for all tokens: slopes of each, the loss and the metrics.

    A hundred thousand tokens are a few megabytes; a second launch would cost as much as the loop.
    """
    sums = zeros(NUM_SUMS, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32) - float("inf")
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = token < num_tokens
        weight = tl.load(weights_ptr + token, mask, 0.0)
        counts = weight != 0.0
        logp = tl.load(logps_ptr + token, counts, 0.0)
        entropy = tl.load(entropies_ptr + token, counts, 0.0)
        advantage = tl.load(advantages_ptr + token, counts, 0.0)
        old_logp = load_or(old_logps_ptr, token, counts, logp, HAS_OLD)
        ref_logp = load_or(ref_logps_ptr, token, counts, logp, HAS_REF)
        rollout_weight = load_or(
            rollout_weights_ptr, token, counts, counts.to(tl.float32), HAS_ROLLOUT
        )
        value, slope, clipped, entropy_coef = token_loss(
            logp, old_logp, ref_logp, advantage, rollout_weight, parameters, token, counts,
            SURROGATE, REGULARISERS, INPUTS, STRIDES, OFFSETS,
        )  # fmt: skip
        # A token without weight may hold anything, and 0 times NaN is NaN.
        value = tl.where(counts, weight * (value - entropy_coef * entropy), 0.0)
        clipped = clipped & counts
        tl.store(slopes_ptr + token, tl.where(counts, weight * slope, 0.0), mask)
        tl.store(entropy_slopes_ptr + token, -entropy_coef * weight, mask)
        tl.store(clipped_ptr + token, clipped, mask)
        more = token_sums(
            counts, value, clipped, advantage, entropy, logp, old_logp, ref_logp, rollout_weight
        )
        sums = add(sums, more)
        largest = tl.maximum(largest, tl.where(counts, logp - old_logp, -float("inf")))
    num_counted = tl.maximum(tl.sum(sums[0], 0), 1.0)
    tl.store(loss_ptr, tl.sum(sums[1], 0))
    for index in tl.static_range(2, NUM_SUMS - 2):
        tl.store(metrics_ptr + index - 2, tl.sum(sums[index], 0) / num_counted)
    tl.store(metrics_ptr + NUM_SUMS - 4, tl.exp(tl.minimum(tl.max(largest, 0), 20.0)))
    rollout_sum = tl.sum(sums[NUM_SUMS - 2], 0)
    square_sum = tl.maximum(num_counted * tl.sum(sums[NUM_SUMS - 1], 0), 1e-38)
    tl.store(metrics_ptr + NUM_SUMS - 3, rollout_sum * rollout_sum / square_sum)


@triton.jit
def token_sums(
    counts, value, clipped, advantage, entropy, logp, old_logp, ref_logp, rollout_weight
):
    """What a block of tokens adds to their number, to the loss, and to `TokenLoss`'s metrics."""
    old_k1, old_k2, old_k3 = divergences(logp, old_logp)
    ref_k1, ref_k2, ref_k3 = divergences(logp, ref_logp)
    low = clipped & (advantage < 0.0)
    return (
        counts.to(tl.float32),
        value,
        (clipped & (advantage > 0.0)).to(tl.float32),
        (low & (old_k1 <= 0.0)).to(tl.float32),
        (low & (old_k1 > 0.0)).to(tl.float32),
        entropy,
        old_k1,
        old_k2,
        old_k3,
        ref_k1,
        ref_k2,
        ref_k3,
        rollout_weight,
        rollout_weight * rollout_weight,
    )


@triton.jit
def divergences(logp, other_logp):
    """d, d^2 / 2 and exp(-d) - 1 + d of d = logp - other_logp within +-20."""
    delta = tl.minimum(tl.maximum(logp - other_logp, -20.0), 20.0)
    return delta, 0.5 * delta * delta, tl.exp(-delta) - 1.0 + delta


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """A tuple of blocks of zeros."""
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.zeros([BLOCK], tl.float32),)
    return blocks


@triton.jit
def add(left, right):
    """Sums of the blocks of two tuples."""
    blocks = ()
    for index in tl.static_range(len(left)):
        blocks = blocks + (left[index] + right[index],)
    return blocks
