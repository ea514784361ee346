"""Surrogates whose importance ratio belongs to a whole completion, as one number per token.

Legend: B completions, S trained tokens. Each function maps detached per-token vectors to the value
and the slope of every token. They are to be maximised after a multiplication by token weights w
that are constant over a completion: objective = sum of w value, d objective / d logp = w slope.
So one slope serves several averages: with w = 1 / (B T), T the length, `geometric_ratio` is GSPO,
and with w = 1 / B it is LUSPO.

Log-ratios of tokens and of completions are clamped to +-20 before exp, and where a clamp acts the
slope is zero. A completion's advantage is that of its first token: estimators repeat it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.ragged import counts, means, number_of, sums

LOG_RATIO_LIMIT = 20.0
GEOMETRIC_LIMIT = 10.0  # upper bound of the mean log-ratio of a completion, verl's value
MIN_TEMPERED_RATIO = 1e-8  # before its powers are taken, TRL's value


class TokenTerms(NamedTuple):
    """(S,) each, to be maximised and not yet weighted."""

    values: Tensor
    slopes: Tensor  # derivative of the weighted sum of values, over the token's own weight


def geometric_ratio(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_index: Tensor,
    *, epsilon_low: float = 3e-4, epsilon_high: float = 4e-4,
) -> TokenTerms:  # fmt: skip
    """min(s A, clip(s) A) with s the geometric mean of token ratios (GSPO, arXiv:2507.18071).

    All are (S,). The epsilons bound s, a mean, and are far below those of a token ratio. LUSPO
    (arXiv:2602.05261) is this with 2e-3, 2.5e-3 and the weights of a sum over tokens.
    """
    num = _num_completions(completion_index)
    first = _first_of_each(advantages, completion_index, num)[completion_index]
    return geometric_token_ratio(
        logps, old_logps, first, completion_index,
        epsilon_low=epsilon_low, epsilon_high=epsilon_high,
    )  # fmt: skip


def geometric_token_ratio(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_index: Tensor,
    *, epsilon_low: float = 3e-4, epsilon_high: float = 4e-4,
) -> TokenTerms:  # fmt: skip
    """min(s A_t, clip(s) A_t) with the gradient through the token alone (GSPO-token, 2507.18071).

    The same as `geometric_ratio` where the advantage (S,) is constant over a completion.
    """
    _check_per_token(advantages, logps)
    log_ratios, inside = _token_log_ratios(logps, old_logps)
    num = _num_completions(completion_index)
    log_means = means(log_ratios, completion_index, num)[completion_index]
    ratios = log_means.clamp(max=GEOMETRIC_LIMIT).exp()
    values, active = _clip(ratios, advantages, epsilon_low, epsilon_high)
    active = active & inside & (log_means <= GEOMETRIC_LIMIT)
    return TokenTerms(values, torch.where(active, ratios * advantages, 0))


def clipped_geometric_ratio(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_index: Tensor,
    *, epsilon_low: float = 0.4, epsilon_high: float = 0.4,
) -> TokenTerms:  # fmt: skip
    """A times the geometric mean of ratios clipped one by one (GMPO, arXiv:2507.20673).

    The epsilons bound log-ratios: above where A > 0, below where A < 0. A clipped token learns
    nothing, its completion does.
    """
    log_ratios, inside = _token_log_ratios(logps, old_logps)
    num = _num_completions(completion_index)
    advantages = _first_of_each(advantages, completion_index, num)[completion_index]
    capped = torch.where(
        advantages > 0, log_ratios.clamp(max=epsilon_high), log_ratios.clamp(min=-epsilon_low)
    )
    values = advantages * means(capped, completion_index, num).exp()[completion_index]
    return TokenTerms(values, torch.where(inside & (capped == log_ratios), values, 0))


def sequence_tempered(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_index: Tensor,
    *, positive_power: float = 2.0, positive_decay: float = 3.0,
    negative_power: float = 3.0, negative_decay: float = 2.0,
) -> TokenTerms:  # fmt: skip
    """sg[w^k exp(c (1 - w))] A logp, w the ratio of the completion (VESPO, arXiv:2602.10693).

    The weight is 1 on-policy and largest at w = k / c; k and c (power and decay) depend on the
    sign of A. To correct for the sampler too, give rollout_logps as old_logps: the logarithms of
    both ratios add up.
    """
    num = _num_completions(completion_index)
    advantages = _first_of_each(advantages, completion_index, num)[completion_index]
    log_ratios = sums(_token_log_ratios(logps, old_logps)[0], completion_index, num)
    log_ratios = log_ratios.clamp(math.log(MIN_TEMPERED_RATIO), LOG_RATIO_LIMIT)[completion_index]
    rises, ones = advantages >= 0, torch.ones_like(logps)
    powers = torch.where(rises, positive_power * ones, negative_power)
    decays = torch.where(rises, positive_decay * ones, negative_decay)
    slopes = advantages * (powers * log_ratios - decays * torch.expm1(log_ratios)).exp()
    return TokenTerms(slopes * logps, slopes)


def tapered_sequence(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, rewards: Tensor, completion_index: Tensor
) -> TokenTerms:
    """A logp for good completions, sg[min(w, 1)] A logp for bad ones (TOPR, arXiv:2503.14286).

    Good is a positive entry of rewards (B,), whatever the sign of A; w is the ratio of the
    completion, so that bad completions which have become unlikely stop pushing.
    """
    num = rewards.shape[0]
    advantages = _first_of_each(advantages, completion_index, num)[completion_index]
    log_ratios = sums(_token_log_ratios(logps, old_logps)[0], completion_index, num)
    tapers = log_ratios.clamp(-LOG_RATIO_LIMIT, 0.0).exp()
    slopes = advantages * torch.where(rewards > 0, 1.0, tapers).to(logps.dtype)[completion_index]
    return TokenTerms(slopes * logps, slopes)


def clipped_sequence_ratio(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_index: Tensor,
    *, epsilon_low: float = 0.2, epsilon_high: float = 0.2,
) -> TokenTerms:  # fmt: skip
    """min(w A, clip(w) A), w the ratio of a completion as one action (RLOO, arXiv:2402.14740).

    The value of a completion is shared equally by its tokens, so that weights 1 / B give its mean.
    """
    advantages = _first_of_each(advantages, completion_index, _num_completions(completion_index))
    return _clipped_sequences(
        logps, old_logps, advantages, completion_index, epsilon_low, epsilon_high
    )


def pairwise_clipped(
    logps: Tensor, old_logps: Tensor, rewards: Tensor, groups: Tensor, completion_index: Tensor,
    *, epsilon: float = 0.2,
) -> TokenTerms:  # fmt: skip
    """Half of min(a w, clip(w) a) for both completions of a prompt (P3O, arXiv:2310.00212, V1).

    a is the reward of a completion minus that of the other one of its prompt, from rewards (B,)
    that already hold the penalty -beta log(old / ref); every prompt needs exactly two completions.
    Weights 1 / B are the mean over pairs with its factor 1/2. A pair with an empty completion
    contributes nothing.
    """
    gains = _reward_gaps(rewards, _partners(groups), completion_index).to(logps.dtype)
    return _clipped_sequences(logps, old_logps, gains, completion_index, epsilon, epsilon)


def pairwise_jointly_clipped(
    logps: Tensor, old_logps: Tensor, rewards: Tensor, groups: Tensor, completion_index: Tensor,
    *, epsilon: float = 0.2,
) -> TokenTerms:  # fmt: skip
    """sg[w1 w2] a logp with one gate for the pair (P3O, arXiv:2310.00212, V2).

    The gate closes where log(w1 / w2) went beyond 2 log(1 + epsilon) in the direction of a, our
    reading of joint clipping. Rewards, weights and empty completions as in `pairwise_clipped`.
    """
    partners = _partners(groups)
    gains = _reward_gaps(rewards, partners, completion_index).to(logps.dtype)
    log_ratios = sums(_token_log_ratios(logps, old_logps)[0], completion_index, rewards.shape[0])
    joint = (log_ratios + log_ratios[partners]).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    leads = (log_ratios - log_ratios[partners]) * gains.sign()
    open_gate = leads <= 2.0 * math.log1p(epsilon)
    slopes = torch.where(open_gate, gains * joint, 0)[completion_index]
    return TokenTerms(slopes * logps, slopes)


SEQUENCE_SURROGATES: dict[str, Callable[..., TokenTerms]] = {
    "geometric_ratio": geometric_ratio,
    "geometric_token_ratio": geometric_token_ratio,
    "clipped_geometric_ratio": clipped_geometric_ratio,
    "sequence_tempered": sequence_tempered,
    "tapered_sequence": tapered_sequence,
    "clipped_sequence_ratio": clipped_sequence_ratio,
    "pairwise_clipped": pairwise_clipped,
    "pairwise_jointly_clipped": pairwise_jointly_clipped,
}


def balanced_bounds(
    logps: Tensor, old_logps: Tensor, advantages: Tensor,
    *, low_start: float = 0.6, low_end: float = 0.8, low_step: float = 0.05,
    high_start: float = 1.2, high_end: float = 2.0, high_step: float = 0.05, target: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ratio bounds (low, high) that balance positive and negative tokens (BAPO, arXiv:2510.18927).

    Of all tokens (S,) of the step, the clipped gains A min(ratio, high) where A >= 0 over the
    clipped losses |A| max(ratio, low) where A < 0 should reach `target`. As in the authors' code,
    low rises first, to its end if need be, and then high. Every call searches from the start.
    Returns two 0-dim float64 tensors.
    """
    _check_per_token(advantages, logps)
    ratios = _token_log_ratios(logps, old_logps)[0].double().exp()
    lows = _candidates(low_start, low_end, low_step, logps.device)
    highs = _candidates(high_start, high_end, high_step, logps.device)
    losses = (-advantages.double().clamp(max=0) * ratios.maximum(lows[:, None])).sum(dim=1)
    gains = (advantages.double().clamp(min=0) * ratios.minimum(highs[:, None])).sum(dim=1)
    low_number = _first_balanced(gains[:1], losses, target)
    high_number = _first_balanced(gains, losses.gather(0, low_number), target)
    return lows.gather(0, low_number)[0], highs.gather(0, high_number)[0]


def _candidates(start: float, end: float, step: float, device: torch.device) -> Tensor:
    """start, start + step, ... and end, added up one by one; (1,) where end <= start."""
    if step <= 0:
        raise ValueError(f"a search for ratio bounds needs a positive step, got {step}")
    bounds = [start]
    while bounds[-1] < end:
        bounds.append(min(bounds[-1] + step, end))
    return torch.tensor(bounds, dtype=torch.float64, device=device)


def _first_balanced(gains: Tensor, losses: Tensor, target: float) -> Tensor:
    """(1,) number of the first candidate whose balance is not below target, or of the last."""
    balances = torch.where(losses > 0, gains / (losses + 1e-8), torch.inf)
    num_below = (balances < target).long().cumprod(dim=0).sum(dim=0, keepdim=True)
    return num_below.clamp(max=balances.shape[0] - 1)


def _token_log_ratios(logps: Tensor, old_logps: Tensor) -> tuple[Tensor, Tensor]:
    """(S,) log-ratios within the limit, and whether they were so by themselves."""
    _check_per_token(old_logps, logps)
    log_ratios = logps - old_logps
    clamped = log_ratios.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return clamped, clamped == log_ratios


def _clip(
    ratios: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """min(ratio A, clip(ratio) A), and where the slope is that of the first; ties count to it."""
    low, high = 1.0 - epsilon_low, 1.0 + epsilon_high
    active = ((advantages <= 0) | (ratios <= high)) & ((advantages >= 0) | (ratios >= low))
    return torch.minimum(ratios * advantages, ratios.clamp(low, high) * advantages), active


def _clipped_sequences(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_index: Tensor,
    epsilon_low: float, epsilon_high: float,
) -> TokenTerms:  # fmt: skip
    """PPO's surrogate with the ratio of the completion; advantages (B,)."""
    num = advantages.shape[0]
    log_ratios, inside = _token_log_ratios(logps, old_logps)
    log_sums = sums(log_ratios, completion_index, num)
    ratios = log_sums.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    values, active = _clip(ratios, advantages, epsilon_low, epsilon_high)
    active &= log_sums.abs() <= LOG_RATIO_LIMIT
    shares = values / counts(completion_index, num).clamp(min=1)
    slopes = torch.where(active, ratios * advantages, 0)
    return TokenTerms(shares[completion_index], torch.where(inside, slopes[completion_index], 0))


def _first_of_each(values: Tensor, completion_index: Tensor, num: int) -> Tensor:
    """(num,) value of the first token of each completion; 0 for an empty one."""
    _check_per_token(values, completion_index)
    lengths = counts(completion_index, num)
    starts = lengths.cumsum(0) - lengths
    padded = torch.cat([values, values.new_zeros(1)])
    return torch.where(lengths > 0, padded[starts], 0)


def _partners(groups: Tensor) -> Tensor:
    """(B,) the other completion of the same prompt."""
    sizes = counts(groups, number_of(groups))
    if bool(((sizes != 2) & (sizes != 0)).any()):
        raise ValueError(
            f"a pairwise surrogate needs exactly 2 completions of every prompt, got groups of "
            f"{sorted(set(sizes.tolist()) - {0})}; set num_generations=2"
        )
    pairs = torch.argsort(groups, stable=True).view(-1, 2)
    partners = torch.empty_like(groups)
    partners[pairs] = pairs.flip(1)
    return partners


def _reward_gaps(rewards: Tensor, partners: Tensor, completion_index: Tensor) -> Tensor:
    """(B,) reward minus the partner's; 0 where one of the two is empty."""
    present = counts(completion_index, rewards.shape[0]) > 0
    return torch.where(present & present[partners], rewards - rewards[partners], 0)


def _num_completions(completion_index: Tensor) -> int:
    """One past the last that has tokens, and 1 for a step without any."""
    return max(number_of(completion_index), 1)


def _check_per_token(vector: Tensor, tokens: Tensor) -> None:
    if vector.shape != tokens.shape:
        raise ValueError(
            f"expected one value per trained token, shape {tuple(tokens.shape)}, got "
            f"{tuple(vector.shape)}; index a per-completion vector with completion_index"
        )
