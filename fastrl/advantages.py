"""How much better each completion is than expected.

Legend: P prompts, G num_generations, B = P*G. Every estimator maps rewards (B,), with the G
completions of one prompt adjacent, to advantages (B,) of the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AdvantageEstimator = Callable[[Tensor, int], Tensor]

STD_EPSILON = 1e-4
"""Added to standard deviations, TRL's value."""
STD_FLOOR = 1e-8
"""A spread below this is rounding, not signal: the advantage is zero, not noise."""


def group_relative(rewards: Tensor, num_generations: int) -> Tensor:
    """(r - mean) / (sample std + 1e-4) in each group (GRPO, arXiv:2402.03300 section 4.1.2)."""
    groups = _groups(rewards, num_generations)
    centred = groups - groups.mean(dim=1, keepdim=True)
    std = groups.std(dim=1, keepdim=True)
    return torch.where(std > STD_FLOOR, centred / (std + STD_EPSILON), 0.0).flatten()


def group_centred(rewards: Tensor, num_generations: int) -> Tensor:
    """r - mean in each group (Dr. GRPO, arXiv:2503.20783)."""
    groups = _groups(rewards, num_generations)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def leave_one_out(rewards: Tensor, num_generations: int) -> Tensor:
    """r minus the mean of the other completions of its group (RLOO, arXiv:2402.14740)."""
    return group_centred(rewards, num_generations) * num_generations / (num_generations - 1)


def batch_relative(rewards: Tensor, num_generations: int) -> Tensor:
    """(r - group mean) / (std of all rewards + 1e-4) (Lite PPO, arXiv:2508.08221)."""
    std = rewards.std()
    centred = group_centred(rewards, num_generations)
    return torch.where(std > STD_FLOOR, centred / (std + STD_EPSILON), 0.0)


def batch_centred(rewards: Tensor, num_generations: int) -> Tensor:
    """r - mean of the whole batch (REINFORCE with a baseline, Williams 1992); needs no groups."""
    return rewards - rewards.mean()


ADVANTAGES: dict[str, AdvantageEstimator] = {
    "group_relative": group_relative,
    "group_centred": group_centred,
    "leave_one_out": leave_one_out,
    "batch_relative": batch_relative,
    "batch_centred": batch_centred,
}
NEEDS_GROUPS = frozenset(ADVANTAGES) - {"batch_centred"}
"""Estimators that compare completions of one prompt: they need at least two."""


def _groups(rewards: Tensor, num_generations: int) -> Tensor:
    """(B,) as (P, G)."""
    if num_generations < 2:
        raise ValueError(
            f"expected at least 2 generations per prompt for a group advantage, got "
            f"{num_generations}; raise num_generations or use batch_centred"
        )
    return rewards.view(-1, num_generations)
