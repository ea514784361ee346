"""Surrogates of one token: from logp, old_logp, advantage and hyper-parameters to (value, slope).

`value` is to be maximised and `slope` is its derivative with respect to `logp`, the current
policy's; `old_logp` is that of the policy that the update started from. In the formulas rho is the
ratio of the two and d its logarithm, A the advantage, p and p_old the probabilities, sg[x] a
constant. Hyper-parameters are numbers or one value per token, brackets hold the published ones.

The functions are plain arithmetic in the `tl` namespace without control flow, so that one source
serves a Triton kernel and, with `tl` bound to torch, the reference. Stop-gradient quantities are
arguments, so `slope` needs no automatic differentiation. Log-ratios are clamped to +-20 before
exp; past it the ratio is constant and its slope zero. On a kink the slope is the unclipped one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrl_kernels.objectives.ratio import (
    clamped_log_ratio,
    clamped_ratio,
    clip,
    kernel_function,
    tl,
)


def policy_gradient(logp, old_logp, advantage):
    """A logp (REINFORCE, Williams 1992)."""
    return advantage * logp, advantage + 0.0 * logp


def log_likelihood(logp, old_logp, advantage):
    """logp: supervised fine-tuning, which does not look at the advantage."""
    return logp, 1.0 + 0.0 * logp


def importance_ratio(logp, old_logp, advantage):
    """rho A, the unclipped importance-sampled surrogate (Kakade and Langford 2002)."""
    ratio, slope = clamped_ratio(logp - old_logp)
    return ratio * advantage, slope * advantage


@kernel_function
def clipped_gain(ratio, slope, advantage, low, high):
    """min(ratio A, clip(ratio, low, high) A) from a ratio and its derivative."""
    # Ties take the unclipped slope: only a ratio strictly outside on its own side stops learning.
    stopped = ((advantage > 0.0) & (ratio > high)) | ((advantage < 0.0) & (ratio < low))
    unclipped = ratio * advantage
    clipped = clip(ratio, low, high) * advantage
    value = tl.where(unclipped < clipped, unclipped, clipped)
    return value, tl.where(stopped, 0.0, slope * advantage)


def clipped_ratio(logp, old_logp, advantage, epsilon_low, epsilon_high):
    """min(rho A, clip(rho) A) (PPO, arXiv:1707.06347; clip-higher: DAPO, arXiv:2503.14476)."""
    ratio, slope = clamped_ratio(logp - old_logp)
    return clipped_gain(ratio, slope, advantage, 1.0 - epsilon_low, 1.0 + epsilon_high)


@kernel_function
def dual_clipped_gain(ratio, slope, advantage, low, high, dual_clip):
    """clipped_gain, for A < 0 no lower than dual_clip A."""
    value, slope = clipped_gain(ratio, slope, advantage, low, high)
    floor = dual_clip * advantage
    value = tl.where((advantage < 0.0) & (value < floor), floor, value)
    return value, tl.where((advantage < 0.0) & (ratio > dual_clip), 0.0, slope)


def dual_clipped_ratio(logp, old_logp, advantage, epsilon_low, epsilon_high, dual_clip):
    """clipped_ratio, but max(it, dual_clip A) for A < 0 (dual-clip PPO, arXiv:1912.09729) [3]."""
    ratio, slope = clamped_ratio(logp - old_logp)
    low, high = 1.0 - epsilon_low, 1.0 + epsilon_high
    return dual_clipped_gain(ratio, slope, advantage, low, high, dual_clip)


def bounded_ratio(logp, old_logp, advantage, low, high, dual_clip):
    """dual_clipped_ratio between bounds of the ratio itself (BAPO, arXiv:2510.18927).

    BAPO moves low from 0.6 to 0.8 and high from 1.2 to 2 until positive and negative tokens weigh
    alike [dual_clip 3].
    """
    ratio, slope = clamped_ratio(logp - old_logp)
    return dual_clipped_gain(ratio, slope, advantage, low, high, dual_clip)


def two_sided_clipped_ratio(logp, old_logp, advantage, epsilon_low, epsilon_high, delta):
    """min(min(rho, delta) A, clip(rho) A) (INTELLECT-2, arXiv:2505.07291).

    With delta above 1 + epsilon_high, as it must be, the same as dual_clipped_ratio.
    """
    ratio, slope = clamped_ratio(logp - old_logp)
    capped = tl.where(ratio > delta, delta, ratio) * advantage
    clipped = clip(ratio, 1.0 - epsilon_low, 1.0 + epsilon_high) * advantage
    stopped = (clipped < capped) | ((advantage < 0.0) & (ratio > delta))
    return tl.where(clipped < capped, clipped, capped), tl.where(stopped, 0.0, slope * advantage)


def masked_ratio(logp, old_logp, advantage, low, high):
    """rho A where rho is in [low, high], else 0: the mask of IcePop (arXiv:2510.18855) [0.5, 5]."""
    ratio, slope = clamped_ratio(logp - old_logp)
    masked = (ratio < low) | (ratio > high)
    return tl.where(masked, 0.0, ratio * advantage), tl.where(masked, 0.0, slope * advantage)


def one_sided_masked_ratio(logp, old_logp, advantage, low, high):
    """rho A, 0 for A > 0 and rho > high or A < 0 and rho < low: the slope of clipped_ratio."""
    ratio, slope = clamped_ratio(logp - old_logp)
    masked = ((advantage > 0.0) & (ratio > high)) | ((advantage < 0.0) & (ratio < low))
    return tl.where(masked, 0.0, ratio * advantage), tl.where(masked, 0.0, slope * advantage)


def probability_masked_ratio(logp, old_logp, advantage, threshold_low, threshold_high):
    """rho A until the probability has moved far in the direction of A (DPPO, arXiv:2602.04879).

    0 for A > 0 and p - p_old > threshold_high, or A < 0 and p - p_old < -threshold_low [0.2]. The
    old policy is meant to be the sampler: pass rollout_logps as old_logps.
    """
    ratio, slope = clamped_ratio(logp - old_logp)
    moved = tl.exp(logp) - tl.exp(old_logp)
    masked = (advantage > 0.0) & (moved > threshold_high)
    masked = masked | ((advantage < 0.0) & (moved < -threshold_low))
    return tl.where(masked, 0.0, ratio * advantage), tl.where(masked, 0.0, slope * advantage)


def truncated_importance(logp, old_logp, advantage, epsilon_low, epsilon_high):
    """sg[clip(rho, 1 - low, 1 + high)] A logp (CISPO, arXiv:2506.13585): none stops learning."""
    ratio, _ = clamped_ratio(logp - old_logp)
    weight = clip(ratio, 1.0 - epsilon_low, 1.0 + epsilon_high) * advantage
    return weight * logp, weight


def tapered(logp, old_logp, advantage, reward):
    """A logp, for rewards <= 0 times sg[min(rho, 1)] (TOPR, arXiv:2503.14286), token by token.

    The reward of the completion decides, whatever the sign of A.
    """
    ratio, _ = clamped_ratio(logp - old_logp)
    weight = tl.where((reward > 0.0) | (ratio > 1.0), 1.0, ratio) * advantage
    return weight * logp, weight


def soft_gated_ratio(logp, old_logp, advantage, temperature_positive, temperature_negative):
    """4 / t sigmoid(t (rho - 1)) A (SAPO, arXiv:2511.20347), t by the sign of A [1, 1.05]."""
    ratio, slope = clamped_ratio(logp - old_logp)
    positive, distance = advantage > 0.0, ratio - 1.0
    distance = tl.where(positive, temperature_positive * distance, temperature_negative * distance)
    decay = tl.exp(-tl.abs(distance))
    gate = tl.where(distance < 0.0, decay, 1.0) / (1.0 + decay)
    value = tl.where(positive, gate / temperature_positive, gate / temperature_negative)
    gate_slope = decay / ((1.0 + decay) * (1.0 + decay))
    return 4.0 * value * advantage, 4.0 * gate_slope * slope * advantage


def quadratic_ratio(logp, old_logp, advantage, epsilon):
    """rho A - |A| (rho - 1)^2 / (2 epsilon) (Simple Policy Optimization, arXiv:2401.16025) [0.2].

    The slope never dies: it leads back to rho = 1 + sign(A) epsilon from both sides.
    """
    ratio, slope = clamped_ratio(logp - old_logp)
    pull = tl.abs(advantage) * (ratio - 1.0) / epsilon
    return ratio * advantage - 0.5 * pull * (ratio - 1.0), slope * (advantage - pull)


def kl_penalised_ratio(logp, old_logp, advantage, beta):
    """rho A - beta (rho - 1 - d), an estimate of KL(old || policy) (PPO, arXiv:1707.06347).

    The published beta adapts to the KL. A token without an advantage is still held back.
    """
    log_ratio, outside = clamped_log_ratio(logp - old_logp)
    ratio = tl.exp(log_ratio)
    value = ratio * advantage - beta * (ratio - 1.0 - log_ratio)
    return value, tl.where(outside, 0.0, ratio * advantage - beta * (ratio - 1.0))


def mirror_descent(logp, old_logp, advantage, step_size):
    """rho A - (rho d - rho + 1) / step_size (MDPO, arXiv:2005.09814) [1 to 0 over the training].

    The penalty estimates KL(policy || old), and holds back tokens without an advantage too.
    """
    log_ratio, outside = clamped_log_ratio(logp - old_logp)
    ratio = tl.exp(log_ratio)
    value = ratio * advantage - (ratio * log_ratio - ratio + 1.0) / step_size
    return value, tl.where(outside, 0.0, ratio * (advantage - log_ratio / step_size))


def drift(logp, old_logp, advantage, alpha, beta):
    """rho A - drift (Discovered Policy Optimisation, arXiv:2210.05639) [2, 0.6].

    The drift is max(0, u - alpha tanh(u / alpha)) of u = (rho - 1) A for A >= 0, and
    max(0, v - beta tanh(v / beta)) of v = d A for A < 0.
    """
    log_ratio, outside = clamped_log_ratio(logp - old_logp)
    ratio = tl.exp(log_ratio)
    gain = ratio * advantage
    rises = advantage >= 0.0
    distance = tl.where(rises, (gain - advantage) / alpha, log_ratio * advantage / beta)
    drifts = distance > 0.0
    decay = tl.exp(-2.0 * tl.where(drifts, distance, 0.0))  # of positive numbers: no overflow
    tanh = (1.0 - decay) / (1.0 + decay)
    # For A >= 0, rho A - u is A: the difference of the two would be lost to rounding.
    rising = tl.where(drifts, advantage + alpha * tanh, gain)
    falling = gain - tl.where(drifts, log_ratio * advantage - beta * tanh, 0.0)
    rising_slope = gain * 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    slope = tl.where(rises, rising_slope, gain - advantage * tanh * tanh)
    return tl.where(rises, rising, falling), tl.where(outside, 0.0, slope)


def shaped_probability(logp, old_logp, advantage, gamma):
    """A p / (p + gamma) (LUFFY, arXiv:2504.14945; Critique-GRPO, arXiv:2506.03106) [0.1].

    For demonstrations, that have no old policy: unlikely tokens learn most.
    """
    probability = tl.exp(logp)
    value = advantage * probability / (probability + gamma)
    return value, value * gamma / (probability + gamma)


def shaped_probability_ratio(logp, old_logp, advantage, gamma):
    """A f(p) / f(p_old), f(p) = p / (p + gamma) (LUFFY, arXiv:2504.14945) [0.1]."""
    log_ratio, outside = clamped_log_ratio(logp - old_logp)
    shift = tl.exp(old_logp + log_ratio) + gamma
    # rho (p_old + gamma) / (p + gamma): f(p_old) itself may be 0.
    value = advantage * tl.exp(log_ratio) * (tl.exp(old_logp) + gamma) / shift
    return value, tl.where(outside, 0.0, value * gamma / shift)


def negative_aware(logp, old_logp, advantage, pass_rate):
    """log rho for A > 0, log max(1, (1 - k rho) / (1 - k)) for A < 0 (NFT, arXiv:2505.18116).

    k is the pass rate of the prompt within [0.02, 0.98], and 1 - k is meant to be a weight of its
    tokens. Only the sign of A counts, which says whether the completion is correct; A = 0 is for
    prompts where all are alike. d is in [-20, 10]; the slope goes straight through that and the 1.
    """
    rate = clip(pass_rate + 0.0 * advantage, 0.02, 0.98)
    log_ratio = clip(logp - old_logp, -20.0, 10.0)
    ratio = tl.exp(log_ratio)
    negative = (1.0 - rate * ratio) / (1.0 - rate)
    negative = tl.where(negative < 1.0, 1.0, negative)
    slope = -rate * ratio / ((1.0 - rate) * negative)
    value = tl.where(advantage < 0.0, tl.log(negative), advantage)
    slope = tl.where(advantage < 0.0, slope, advantage)
    return tl.where(advantage > 0.0, log_ratio, value), tl.where(advantage > 0.0, 1.0, slope)


def linear_bound(logp, old_logp, advantage):
    """A (1 + d) for A >= 0, A rho for A < 0 (BGPO, arXiv:2510.11683): a lower bound of rho A."""
    log_ratio = logp - old_logp
    ratio, slope = clamped_ratio(log_ratio)
    negative = advantage < 0.0
    factor = tl.where(negative, ratio, 1.0 + log_ratio)
    return factor * advantage, tl.where(negative, slope, 1.0) * advantage


SURROGATES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        policy_gradient,
        log_likelihood,
        importance_ratio,
        clipped_ratio,
        dual_clipped_ratio,
        bounded_ratio,
        two_sided_clipped_ratio,
        masked_ratio,
        one_sided_masked_ratio,
        probability_masked_ratio,
        truncated_importance,
        tapered,
        soft_gated_ratio,
        quadratic_ratio,
        kl_penalised_ratio,
        mirror_descent,
        drift,
        shaped_probability,
        shaped_probability_ratio,
        negative_aware,
        linear_bound,
    )
}
