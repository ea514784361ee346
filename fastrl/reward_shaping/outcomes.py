"""Rewards from several judges, of several turns and for what was spent on the answer.

Legend: B completions, R separate rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def clipped(rewards: Tensor, *, bound: float = 10.0) -> Tensor:
    """Rewards between -bound and bound."""
    return rewards.clamp(-bound, bound)


def verified_or_unfinished(
    rewards: Tensor, finished: Tensor, *, verified_reward: float = 10.0,
    unfinished_reward: float = -10.0, pass_threshold: float = 1.0,
) -> Tensor:  # fmt: skip
    """verified_reward where correct, else 0; unfinished_reward where the length limit cut it
    (Tulu 3, arXiv:2411.15124).
    """
    correct = (rewards >= pass_threshold).to(rewards.dtype)
    return torch.where(finished, verified_reward * correct, unfinished_reward)


def running_scaled(rewards: Tensor, reward_scale: Tensor, *, bound: float = 10.0) -> Tensor:
    """Rewards over their running standard deviation, between -bound and bound (PPO-max,
    arXiv:2307.04964). The mean stays where it is.
    """
    return (rewards / reward_scale).clamp(-bound, bound)


def tool_efficiency(
    rewards: Tensor,
    num_calls: Tensor,
    fewest_calls: Tensor,
    *,
    max_calls: int = 4,
    alpha: float = 1.0,
) -> Tensor:
    """alpha * r * efficiency of its tool calls (OTC, arXiv:2504.14870).

    num_calls: (B,) calls made; fewest_calls: (B,) fewest calls of any correct completion of the
    prompt so far, which give efficiency 1. fewest_calls of 0, also for unknown, is the form for
    PPO: cos(pi * calls / (2 * calls + max_calls)). max_calls: 4 for search, 3 for code.
    """
    calls = num_calls.to(rewards.dtype)
    fewest = fewest_calls.to(rewards.dtype)
    of_free = torch.cos(math.pi * calls / (2 * calls + max_calls))
    harmonic = 2 * fewest * calls / (calls + fewest).clamp(min=1)
    of_needed = torch.sin(math.pi / 2 * harmonic / fewest.clamp(min=1))
    return alpha * rewards * torch.where(fewest > 0, of_needed, of_free)


def discounted_turns(
    rewards: Tensor, turns: Tensor, num_turns: Tensor, *, discount: float = 0.995
) -> Tensor:
    """r * discount^(num_turns - turn): final reward on every turn (IterResearch, arXiv:2511.07327).

    turns: (B,) from 1 to num_turns (B,). The published discount is not known; 0.995 is ours.
    """
    return rewards * discount ** (num_turns - turns).to(rewards.dtype)


def cheap_mode(
    rewards: Tensor, used_expensive: Tensor, pass_rates: Tensor, *, alpha: float = 2.0
) -> Tensor:
    """r + 1, or r + 1 - pass_rate^alpha where an expensive mode was used (A2FM).

    used_expensive: (B,) bool; pass_rates: (B,) of the prompt with the modes forced. An expensive
    mode costs most where the prompt is easy.
    """
    return rewards + 1 - torch.where(used_expensive, pass_rates.to(rewards.dtype) ** alpha, 0)


def ensemble_mean(reward_parts: Tensor) -> Tensor:
    """Mean over the reward models (arXiv:2310.02743)."""
    return reward_parts.mean(dim=0)


def ensemble_worst(reward_parts: Tensor) -> Tensor:
    """Lowest of the reward models (arXiv:2310.02743)."""
    return reward_parts.amin(dim=0)


def ensemble_cautious(reward_parts: Tensor, *, caution: float = 0.1) -> Tensor:
    """Mean - caution * sample variance over the reward models (arXiv:2310.02743).

    0.1 was published for PPO, 0.5 for best-of-n. One model alone has no variance.
    """
    variances = reward_parts.var(dim=0, correction=min(1, len(reward_parts) - 1))
    return reward_parts.mean(dim=0) - caution * variances


def weighted_sum(reward_parts: Tensor, *, weights: Sequence[float]) -> Tensor:
    """Sum of weight * reward over the separate rewards; a cost has a negative weight."""
    if len(weights) != len(reward_parts):
        raise ValueError(
            f"expected one weight for each of {len(reward_parts)} rewards, got {len(weights)}"
        )
    return torch.tensordot(reward_parts.new_tensor(weights), reward_parts, dims=1)
