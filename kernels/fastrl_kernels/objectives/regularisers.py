"""Regularisers of one token: from log-probabilities and hyper-parameters to (value, slope).

`value` is a penalty to be minimised and `slope` its derivative with respect to `logp`. The first
arguments are logp and ref_logp, logp and old_logp, or all three, under these names. Otherwise as
the surrogates: plain arithmetic in the `tl` namespace without control flow. In the formulas delta
is logp - ref_logp, d is logp - old_logp, rho = exp(d), and sg[x] a constant. A log-ratio is clamped
to +-20 before exp, and outside the penalty is constant.

What a penalty does is its expected gradient over tokens that the policy sampled itself, and that is
rarely the gradient of the expected penalty: delta estimates KL(policy || ref) without bias, and its
expected gradient is zero, so it is no penalty here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrl_kernels.objectives.ratio import clamped_log_ratio, clamped_ratio, kernel_function, tl


def k1_score(logp, ref_logp):
    """sg[delta] logp: the score-function form of the reverse KL; unbiased on-policy gradient."""
    delta = logp - ref_logp
    return delta * logp, delta


def k2(logp, ref_logp):
    """delta^2 / 2 (Schulman 2020): its on-policy gradient is that of the reverse KL."""
    delta = logp - ref_logp
    return 0.5 * delta * delta, delta


@kernel_function
def k3_penalty(delta):
    """exp(-delta) - 1 + delta of delta clamped to +-20, and its derivative."""
    clamped, outside = clamped_log_ratio(delta)
    inverse = tl.exp(-clamped)
    return inverse - 1.0 + clamped, tl.where(outside, 0.0, 1.0 - inverse)


def k3(logp, ref_logp):
    """exp(-delta) - 1 + delta (Schulman 2020; GRPO, arXiv:2402.03300 equation 4).

    An unbiased, never negative estimate of KL(policy || ref), but its on-policy gradient is that of
    KL(ref || policy).
    """
    return k3_penalty(logp - ref_logp)


def k3_old(logp, old_logp):
    """exp(-d) - 1 + d: k3 towards the old policy (TRPA, arXiv:2504.04524).

    In the first pass over a batch it is zero and has no slope.
    """
    return k3_penalty(logp - old_logp)


def k3_plus(logp, ref_logp):
    """The value of k3 with the slope of k2, which is that of KL(policy || ref) on-policy (verl)."""
    delta = logp - ref_logp
    value, _ = k3_penalty(delta)
    return value, delta


def k3_is(logp, old_logp, ref_logp):
    """rho (exp(-delta) - 1 + delta) (DeepSeek-V3.2, arXiv:2512.02556), of slope rho delta.

    Tokens of the old policy give the gradient of KL(policy || ref) without bias. The slope is zero
    outside either clamp: that of one factor alone would lead away from the reference.
    """
    log_ratio, ratio_outside = clamped_log_ratio(logp - old_logp)
    delta, delta_outside = clamped_log_ratio(logp - ref_logp)
    ratio = tl.exp(log_ratio)
    value = ratio * (tl.exp(-delta) - 1.0 + delta)
    return value, tl.where(ratio_outside | delta_outside, 0.0, ratio * delta)


def k2_is(logp, old_logp, ref_logp):
    """sg[rho] delta^2 / 2: like k3_is the gradient of KL(policy || ref) from the old policy."""
    ratio, _ = clamped_ratio(logp - old_logp)
    delta = logp - ref_logp
    return 0.5 * ratio * delta * delta, ratio * delta


@kernel_function
def absolute_value(difference):
    """|difference| and its derivative, 0 at 0."""
    sign = tl.where(difference > 0.0, 1.0, tl.where(difference < 0.0, -1.0, difference))
    return tl.abs(difference), sign


def absolute(logp, ref_logp):
    """|delta|: its on-policy gradient is that of sum |p - p_ref|, twice the total variation."""
    return absolute_value(logp - ref_logp)


def absolute_old(logp, old_logp):
    """|d|, which KL-Cov (arXiv:2505.22617) adds to tokens of high covariance alone.

    Its on-policy gradient is that of twice the total variation to the old policy. In the first pass
    over a batch it is zero and has no slope.
    """
    return absolute_value(logp - old_logp)


def squared_old(logp, old_logp):
    """d^2, a penalty on drift from the policy that sampled (prime-rl).

    Over tokens of the current policy its gradient is twice that of KL(policy || old).
    """
    log_ratio = logp - old_logp
    return log_ratio * log_ratio, 2.0 * log_ratio


def entropy_sample(logp, old_logp):
    """sg[logp] logp: the score-function form of minus the entropy; unbiased on-policy gradient."""
    return logp * logp, logp


def negative_log_likelihood(logp, old_logp):
    """-logp: likelihood as an anchor (VAPO, arXiv:2504.05118: 0.1 on correct completions).

    A per-token coefficient says which tokens: demonstrations (RPO, arXiv:2405.16436), pre-training
    text (PPO-ptx, arXiv:2203.02155). Over tokens of the policy itself its expected gradient is
    zero, although PAPO (arXiv:2507.06448) calls it an entropy loss.
    """
    return -logp, -1.0 + 0.0 * logp


def chi_squared_likelihood(logp, ref_logp):
    """-(delta - delta^2 / 4), fine-tuning with Pearson's chi^2 (arXiv:2507.00018).

    For demonstrations, not for samples; past delta = 2 a token is pulled down again. Experimental.
    """
    delta = logp - ref_logp
    return 0.25 * delta * delta - delta, 0.5 * delta - 1.0


def hellinger_likelihood(logp, ref_logp):
    """exp(-delta) - 1, fine-tuning with the squared Hellinger distance (arXiv:2507.00018).

    For demonstrations, not for samples. Experimental.
    """
    inverse, slope = clamped_ratio(ref_logp - logp)
    return inverse - 1.0, -slope


def jensen_shannon_likelihood(logp, ref_logp):
    """-log sigmoid(delta), fine-tuning with the Jensen-Shannon divergence (arXiv:2507.00018).

    For demonstrations, not for samples. Experimental.
    """
    delta = logp - ref_logp
    decay = tl.exp(-tl.abs(delta))
    value = tl.log(1.0 + decay) - tl.where(delta < 0.0, delta, 0.0)
    return value, -tl.where(delta < 0.0, 1.0, decay) / (1.0 + decay)


REGULARISERS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        k1_score,
        k2,
        k3,
        k3_old,
        k3_plus,
        k3_is,
        k2_is,
        absolute,
        absolute_old,
        squared_old,
        entropy_sample,
        negative_log_likelihood,
        chi_squared_likelihood,
        hellinger_likelihood,
        jensen_shannon_likelihood,
    )
}
