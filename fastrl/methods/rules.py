"""What a method computes from the batch: hyper-parameters of surrogates, tokens of regularisers.

Legend: B completions, S trained tokens. A rule is a function of what its positional parameters are
named after and returns values by the name of the surrogate's parameter: numbers in tensors of
shape (), or one value per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.sequence_surrogates import balanced_bounds as find_bounds
from fastrl.token_weights import covariance_top, entropy_clip_bounds, pass_rates

Computed = dict[str, Tensor]


def balanced_bounds(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, target: float = 1.0,
    low_start: float = 0.6, low_end: float = 0.8, low_step: float = 0.05, high_start: float = 1.2,
    high_end: float = 2.0, high_step: float = 0.05,
) -> Computed:  # fmt: skip
    """Bounds at which positive advantages weigh as much as negative ones (BAPO)."""
    low, high = find_bounds(
        logps, old_logps, advantages, target=target, low_start=low_start, low_end=low_end,
        low_step=low_step, high_start=high_start, high_end=high_end, high_step=high_step,
    )  # fmt: skip
    return {"low": low, "high": high}


def entropy_bounds(
    entropies: Tensor, *, epsilon_low: float = 0.2, epsilon_high: float = 0.2, quantile: float = 0.8
) -> Computed:
    """Clip bounds that widen with the entropy of the token (HAPO)."""
    bounds = entropy_clip_bounds(
        entropies, epsilon_low=epsilon_low, epsilon_high=epsilon_high, quantile=quantile
    )
    return bounds._asdict()


def group_pass_rates(
    rewards: Tensor, groups: Tensor, completion_index: Tensor, *, lowest: float = 0.02,
    highest: float = 0.98, pass_threshold: float = 0.5,
) -> Computed:  # fmt: skip
    """Each token's share of completions of its prompt that pass (NFT)."""
    rates = pass_rates(rewards, groups, pass_threshold=pass_threshold).clamp(lowest, highest)
    return {"pass_rate": rates[groups][completion_index]}


def annealed_step_size(progress: Tensor, *, start: float = 1.0, smallest: float = 1e-3) -> Computed:
    """A step size that falls linearly to zero over training (mirror descent)."""
    return {"step_size": torch.clamp(start * (1 - progress), min=smallest)}


def completion_rewards(rewards: Tensor, completion_index: Tensor) -> Computed:
    """Each token's reward, that of its completion, where a surrogate goes by its sign (TOPR)."""
    return {"reward": rewards[completion_index]}


def correct_tokens(rewards: Tensor, completion_index: Tensor) -> Tensor:
    """(S,) of completions with a positive reward all tokens over theirs, else 0 (VAPO).

    Under token_mean the penalty is then a mean over the tokens of those completions alone.
    """
    correct = (rewards > 0)[completion_index].to(rewards.dtype)
    return correct * correct.numel() / correct.sum().clamp(min=1)


COMPUTED: dict[str, Callable[..., Computed]] = {
    "balanced_bounds": balanced_bounds,
    "entropy_bounds": entropy_bounds,
    "group_pass_rates": group_pass_rates,
    "annealed_step_size": annealed_step_size,
    "completion_rewards": completion_rewards,
}
TOKEN_RULES: dict[str, Callable[..., Tensor]] = {
    "covariance_top": covariance_top,
    "correct_tokens": correct_tokens,
}
"""How much of a regulariser each token has; 0 where it is for others."""
