"""How much each token of a kept completion counts, and how far its ratio may move.

Legend: S trained tokens. Every rule of TOKEN_WEIGHTS returns (S,) weights in the dtype of its
input, all over the trained tokens of the whole optimizer step; weights of several rules multiply.
A rule that picks tokens gives 1 to those and 0 to the others (`random` gives more), picks at least
one and breaks ties by index. Entropies and log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.ragged import means, number_of, sums
from fastrl_kernels.token_selection import select_tokens


class ClipBounds(NamedTuple):
    """(S,) distances from 1 at which the ratio of each token is clipped."""

    epsilon_low: Tensor
    epsilon_high: Tensor


def high_entropy(entropies: Tensor, *, fraction: float = 0.2) -> Tensor:
    """1 from the (1 - fraction) quantile of the entropies up ("80/20", arXiv:2506.01939).

    The quantile is interpolated between tokens, so 1 + floor(fraction * (S - 1)) tokens are at
    least as large.
    """
    _check_fraction(fraction)
    num_kept = 1 + int(fraction * max(0, entropies.numel() - 1) + 1e-9)
    return select_tokens(entropies, budget=num_kept).to(entropies.dtype)


def advantage_entropy(advantages: Tensor, entropies: Tensor, *, fraction: float = 0.2) -> Tensor:
    """1 for the largest |advantage| * entropy (D3S, arXiv:2509.22115).

    Published to start at 0.2 and to grow to 1. Tokens with weight 0 leave the denominators: see
    kept_lengths.
    """
    _check_fraction(fraction)
    scores = advantages.abs() * entropies
    return select_tokens(scores, ratio=fraction).to(scores.dtype)


def random(advantages: Tensor, generator: torch.Generator, *, fraction: float = 0.5) -> Tensor:
    """S / K for K tokens drawn by chance: the gradient is that of all tokens on average.

    K is a share `fraction` of the S tokens, at least one. Each is drawn with probability K / S,
    whose inverse makes every sum over tokens right on average (Horvitz and Thompson 1952). Of
    `advantages` only their number matters.
    """
    _check_fraction(fraction)
    num_tokens = advantages.numel()
    num_drawn = _share(num_tokens, fraction)
    drawn = torch.randperm(num_tokens, generator=generator, device=generator.device)[:num_drawn]
    weights = torch.zeros_like(advantages)
    return weights.index_fill(0, drawn.to(weights.device), num_tokens / num_drawn)


def clip_covariance(
    logps: Tensor,
    advantages: Tensor,
    clipped: Tensor,
    generator: torch.Generator,
    *,
    fraction: float = 2e-4,
    lowest: float = 1.0,
    highest: float = 5.0,
) -> Tensor:
    """0 for tokens drawn by chance among those of high covariance (Clip-Cov, arXiv:2505.22617).

    Candidates have (advantage - mean) * (logp - mean) between `lowest` and `highest`, both
    excluded, and are not `clipped` (S,) bool by the ratio already. As many are drawn as `fraction`
    of all S tokens, at least one, or all candidates if there are fewer.
    """
    _check_fraction(fraction)
    covariances = _covariances(logps, advantages)
    candidates = (covariances > lowest) & (covariances < highest) & ~clipped
    draws = torch.rand(logps.numel(), generator=generator, device=generator.device)
    num_drawn = _share(logps.numel(), fraction)
    drawn = select_tokens(draws.to(logps.device), candidates, budget=num_drawn)
    return 1 - drawn.to(logps.dtype)


def curvature(
    logps: Tensor,
    advantages: Tensor,
    sum_p2: Tensor,
    sum_p3: Tensor,
    squared_hidden_norms: Tensor,
    *,
    learning_rate: float = 1.5e-5,
    max_policy_shift: float = 1e-4,
    max_objective_shift: float = 0.01,
) -> Tensor:
    """1 where a gradient step on the token alone moves policy and objective little (CAPO).

    The step is plain gradient descent on the output matrix, for which the second-order shifts have
    a closed form in sum p^2, sum p^3 and the squared length of the last hidden state,
    squared_hidden_norms (S,). Tokens with weight 0 leave the denominators: see kept_lengths.
    """
    p = logps.exp()
    step = learning_rate * advantages * squared_hidden_norms
    score_norms = 1 - 2 * p + sum_p2
    score_variances = (p - 2 * p.square() + sum_p3) - (p - sum_p2).square()
    policy_shifts = (step * score_norms).square() / 2
    second_order = advantages * step.square() * (score_norms.square() - score_variances) / 2
    objective_shifts = step * advantages * score_norms + second_order
    kept = (policy_shifts <= max_policy_shift) & (objective_shifts.abs() <= max_objective_shift)
    return kept.to(logps.dtype)


def failure_rates(
    rewards: Tensor, groups: Tensor, completion_index: Tensor, *, lowest: float = 0.02,
    highest: float = 0.98, pass_threshold: float = 0.5,
) -> Tensor:  # fmt: skip
    """Share of a prompt's completions that fail: hard prompts count more (NFT, arXiv:2505.18116).

    lowest, highest: where the pass rate is clipped.
    """
    rates = pass_rates(rewards, groups, pass_threshold=pass_threshold).clamp(lowest, highest)
    return (1 - rates)[groups][completion_index]


def pass_rates(rewards: Tensor, groups: Tensor, *, pass_threshold: float = 0.5) -> Tensor:
    """(P,) share of the completions of each prompt that pass."""
    passed = (rewards >= pass_threshold).to(rewards.dtype)
    return means(passed, groups, number_of(groups))


def probability_power(logps: Tensor, *, power: float) -> Tensor:
    """p^power of the sampled token: above 0 unlikely tokens count less."""
    return (power * logps).exp()


def entropy_redistribution(
    entropies: Tensor,
    logps: Tensor,
    old_logps: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    quantile: float = 0.8,
) -> Tensor:
    """1 + relative entropy for certain tokens at rest and uncertain tokens that move (HAPO).

    At rest is a ratio strictly inside half of the token's own clip bounds. Certain tokens, of
    relative entropy at most 0, are damped there; uncertain ones are raised outside. Other tokens
    keep 1. Published as a factor of the advantage, which is the same for clipped ratios because
    the factor is never negative.
    """
    relative = relative_entropies(entropies, quantile=quantile)
    bounds = _bounds(relative, epsilon_low, epsilon_high)
    ratios = (logps - old_logps).clamp(-20, 20).exp()
    at_rest = (ratios > 1 - bounds.epsilon_low / 2) & (ratios < 1 + bounds.epsilon_high / 2)
    return torch.where(at_rest == (relative <= 0), 1 + relative, 1)


TOKEN_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "high_entropy": high_entropy,
    "advantage_entropy": advantage_entropy,
    "random": random,
    "clip_covariance": clip_covariance,
    "curvature": curvature,
    "failure_rates": failure_rates,
    "probability_power": probability_power,
    "entropy_redistribution": entropy_redistribution,
}
LEAVES_DENOMINATOR = frozenset({"advantage_entropy", "curvature"})
"""Rules whose tokens of weight 0 do not count in averages; those of all others do."""


def kept_lengths(token_weights: Tensor, completion_index: Tensor, lengths: Tensor) -> Tensor:
    """(B,) int64 tokens of each completion with a weight other than 0, to aggregate with."""
    kept = (token_weights != 0).double()
    return sums(kept, completion_index, lengths.numel()).to(lengths.dtype)


def covariance_top(logps: Tensor, advantages: Tensor, *, fraction: float = 2e-3) -> Tensor:
    """(S,) 1 for the tokens of highest covariance, which KL-Cov penalises (arXiv:2505.22617).

    The factor of the penalty |logp - old_logp|, not of the loss: other tokens keep theirs. A
    share `fraction` of all tokens, at least one; published as 2e-3 for 7B parameters and 2e-4
    for 32B.
    """
    _check_fraction(fraction)
    covariances = _covariances(logps, advantages)
    return select_tokens(covariances, ratio=fraction).to(covariances.dtype)


def relative_entropies(entropies: Tensor, *, quantile: float = 0.8) -> Tensor:
    """(S,) log entropies relative to their quantile, scaled to [-1, 1] on either side (HAPO).

    The quantile is the nearest token's. The largest becomes 1 and the smallest -1, whatever the
    spread; where nothing lies on one side of the quantile, that side is 0. The released code
    divides the lower side by a negative number and loses its sign; the method needs it.
    """
    if entropies.numel() == 0:
        return entropies
    logs = entropies.clamp(min=1e-8).log()
    middle = torch.sort(logs).values[round(quantile * (logs.numel() - 1))]
    # The published division by the spread cancels in the scaling that follows.
    above, below = (logs - middle).clamp(min=0), (middle - logs).clamp(min=0)
    return _scaled_to_one(above) - _scaled_to_one(below)


def entropy_clip_bounds(
    entropies: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    quantile: float = 0.8,
) -> ClipBounds:
    """Clip bounds that widen with entropy: upwards if it is high, downwards if it is low (HAPO).

    epsilon_high * (1 + relative entropy) above the quantile, epsilon_low * (1 - relative entropy)
    below, at most twice the published 0.2; the other bound of a token stays.
    """
    relative = relative_entropies(entropies, quantile=quantile)
    return _bounds(relative, epsilon_low, epsilon_high)


def _bounds(relative: Tensor, epsilon_low: float, epsilon_high: float) -> ClipBounds:
    low = epsilon_low * (1 - relative.clamp(max=0))
    return ClipBounds(low, epsilon_high * (1 + relative.clamp(min=0)))


def _covariances(logps: Tensor, advantages: Tensor) -> Tensor:
    """(S,) contribution of each token to the covariance of log-probability and advantage."""
    return (advantages - advantages.mean()) * (logps - logps.mean())


def _scaled_to_one(values: Tensor) -> Tensor:
    largest = values.max()
    return values / torch.where(largest > 0, largest, 1)


def _share(num_tokens: int, fraction: float) -> int:
    """Whole tokens in a fraction of all, at least one."""
    return max(1, int(fraction * num_tokens + 1e-9))


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"expected a fraction of the tokens in (0, 1], got {fraction}")
