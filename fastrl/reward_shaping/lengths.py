"""Rewards that depend on the length of the completion.

Legend: B completions. Lengths, limits and budgets count tokens; a completion is correct where its
reward is at least pass_threshold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_overlong(
    rewards: Tensor, lengths: Tensor, max_completion_length: int, *, cache: int = 4096
) -> Tensor:
    """r minus a penalty that grows from 0 to 1 over the last `cache` tokens before the limit
    (DAPO, arXiv:2503.14476). Published with a limit of 20480.
    """
    if not 0 < cache <= max_completion_length:
        raise ValueError(
            f"expected a cache between 1 and max_completion_length={max_completion_length} tokens, "
            f"got {cache}; DAPO uses a fifth of the limit"
        )
    excess = lengths.to(rewards.dtype) - (max_completion_length - cache)
    return rewards - (excess / cache).clamp(0, 1)


def truncated_to_zero(rewards: Tensor, finished: Tensor) -> Tensor:
    """0 where the length limit cut the completion (DLER); published with a limit of 4000."""
    return torch.where(finished, rewards, 0)


def unfinished_penalised(rewards: Tensor, finished: Tensor, *, penalty: float = 1.0) -> Tensor:
    """r - penalty where the completion does not end by itself."""
    return torch.where(finished, rewards, rewards - penalty)


def exact_length(
    rewards: Tensor,
    lengths: Tensor,
    target_lengths: Tensor,
    *,
    alpha: float = 3e-4,
    pass_threshold: float = 1.0,
) -> Tensor:
    """1 if correct, minus alpha for every token off the target (L1-Exact, arXiv:2503.04697).

    target_lengths: (B,) tokens that the prompt asked for.
    """
    correct = (rewards >= pass_threshold).to(rewards.dtype)
    return correct - alpha * (target_lengths - lengths).abs().to(rewards.dtype)


def maximum_length(
    rewards: Tensor,
    lengths: Tensor,
    target_lengths: Tensor,
    *,
    alpha: float = 3e-4,
    delta: float = 0.5,
    pass_threshold: float = 1.0,
) -> Tensor:
    """clip(alpha * (target - length) + delta, 0, 1) if correct, else 0 (L1-Max, arXiv:2503.04697).

    target_lengths: (B,) tokens that the prompt allowed.
    """
    spared = alpha * (target_lengths - lengths).to(rewards.dtype)
    return torch.where(rewards >= pass_threshold, (spared + delta).clamp(0, 1), 0)


def history_length(
    rewards: Tensor,
    lengths: Tensor,
    shortest_lengths: Tensor,
    *,
    weight: float = 1.0,
    floor: float = -0.7,
    pass_threshold: float = 1.0,
) -> Tensor:
    """1 if correct, plus weight * how much shorter than ever before (history-aware HAPO).

    shortest_lengths: (B,) tokens of the shortest correct completion of the prompt in earlier steps,
    0 where there is none, which gives no length reward. cos(pi / 2 * min(length / shortest, 2)) is
    1 for nothing, 0 at the shortest and -1 at twice that; a correct completion gets at least
    `floor` of it and a wrong one at most 0, so that every correct one stays above every wrong one.
    """
    correct = rewards >= pass_threshold
    shares = lengths.to(rewards.dtype) / shortest_lengths.clamp(min=1).to(rewards.dtype)
    cosines = torch.cos(math.pi / 2 * shares.clamp(max=2))
    bounded = torch.where(correct, cosines.clamp(min=floor), cosines.clamp(max=0))
    return correct.to(rewards.dtype) + weight * torch.where(shortest_lengths > 0, bounded, 0)


def budgeted_cosine(
    rewards: Tensor,
    lengths: Tensor,
    budgets: Tensor,
    max_completion_length: int,
    *,
    scale: float = 4.0,
    pass_threshold: float = 1.0,
) -> Tensor:
    """Reward of a correct completion that falls beyond its budget (HBPO, arXiv:2507.15844).

    budgets: (B,) tokens the prompt granted. scale * cos(pi / 2 * share of the limit), the share
    being the budget or the length, whichever is longer; beyond the budget also minus the tokens
    too many over the limit. 0 where wrong or longer than the limit.
    """
    limit = max_completion_length
    longer = torch.maximum(lengths, budgets).to(rewards.dtype)
    excess = longer - budgets.to(rewards.dtype)
    shaped = scale * torch.cos(math.pi / 2 * longer / limit) - excess / limit
    earns = (rewards >= pass_threshold) & (lengths <= limit)
    return torch.where(earns, shaped, 0)
