"""group_relative plus one more term for each completion.

Legend: B completions. Rewards and advantages are (B,), groups (B,) int64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrl.advantages.groups import group_relative
from fastrl.advantages.statistics import STD_EPSILON, require_same_shape
from fastrl.ragged import means, number_of, sums


def reference_margin(
    rewards: Tensor,
    groups: Tensor,
    ref_rewards: Tensor,
    *,
    low: float = -0.2,
    high: float = 0.28,
    std_epsilon: float = STD_EPSILON,
) -> Tensor:
    """group_relative + clip(r - reference r, low, high) (AAPO, arXiv:2505.14264).

    ref_rewards: (B,) rewards of the reference model's completions of the same prompts, one for
    each of ours. A prompt that scores alike still moves the policy towards beating the reference.
    """
    require_same_shape(rewards=rewards, ref_rewards=ref_rewards)
    margin = (rewards - ref_rewards).clamp(low, high)
    return group_relative(rewards, groups, std_epsilon=std_epsilon) + margin


def budget_margin(
    rewards: Tensor,
    groups: Tensor,
    budgets: Tensor,
    max_completion_length: int,
    *,
    height: float = 4.0,
    std_epsilon: float = STD_EPSILON,
) -> Tensor:
    """group_relative + (mean reward of the budget - what the budget is worth) (HBPO).

    budgets: (B,) tokens that the prompt of each completion allowed; completions of one prompt and
    one budget share a mean. A budget b is worth height cos(pi b / (2 max_completion_length)), the
    reward of a correct completion within it (arXiv:2507.15844). The released code adds the term
    twice; this is the paper's.
    """
    require_same_shape(groups=groups, budgets=budgets)
    kinds = torch.unique(budgets, return_inverse=True)[1]
    subgroups = groups * number_of(kinds) + kinds
    means_of_budgets = means(rewards, subgroups, number_of(subgroups))[subgroups]
    worth = height * torch.cos(budgets.to(rewards.dtype) * (math.pi / (2 * max_completion_length)))
    return means_of_budgets - worth + group_relative(rewards, groups, std_epsilon=std_epsilon)


def early_tool_calls(
    rewards: Tensor,
    groups: Tensor,
    lengths: Tensor,
    tool_positions: Tensor,
    *,
    strength: float = -2.0,
    bound: float = 0.7,
    threshold: float = 0.5,
    std_epsilon: float = STD_EPSILON,
) -> Tensor:
    """A + clip(strength (p - mean p) / mean length, +-bound abs(A)), A group_relative (ASPO).

    tool_positions: (B,) int64 index p of the first token of the first tool call, -1 without one.
    Only completions that call a tool and whose reward exceeds the threshold are changed and enter
    the means of their group (arXiv:2508.19201). A bound below 1 never turns an advantage around.
    """
    require_same_shape(rewards=rewards, lengths=lengths, tool_positions=tool_positions)
    num_groups = number_of(groups)
    advantages = group_relative(rewards, groups, std_epsilon=std_epsilon)
    eligible = (rewards > threshold) & (tool_positions >= 0)
    num_eligible = sums(eligible.to(rewards.dtype), groups, num_groups).clamp(min=1)
    positions = torch.where(eligible, tool_positions, 0).to(rewards.dtype)
    tokens = torch.where(eligible, lengths, 0).to(rewards.dtype)
    mean_position = (sums(positions, groups, num_groups) / num_eligible)[groups]
    mean_length = (sums(tokens, groups, num_groups) / num_eligible)[groups].clamp(min=1)
    largest = bound * advantages.abs()
    earliness = (strength * (positions - mean_position) / mean_length).clamp(-largest, largest)
    return torch.where(eligible, advantages + earliness, advantages)
