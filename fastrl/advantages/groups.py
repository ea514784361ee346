"""How much better a completion is than the others of its prompt or its batch.

Legend: B completions, P prompts. Rewards and advantages are (B,); groups (B,) int64 names the
prompt of each completion, in any order and of any sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.statistics import (
    STD_EPSILON,
    alone,
    centre,
    centre_in_groups,
    require_same_shape,
    running_square,
    scale,
    spread,
    spread_in_groups,
    whiten,
)
from fastrl.ragged import counts, number_of, sums


def group_relative(rewards: Tensor, groups: Tensor, *, std_epsilon: float = STD_EPSILON) -> Tensor:
    """(r - mean) / (sample std + epsilon) in each group (GRPO, arXiv:2402.03300 section 4.1.2).

    Zero where a whole group scored alike; r / (1 + epsilon) in a group of one.
    """
    centred = centre_in_groups(rewards, groups)
    return scale(centred, spread_in_groups(rewards, groups), std_epsilon=std_epsilon)


def group_centred(rewards: Tensor, groups: Tensor) -> Tensor:
    """r - mean in each group (Dr. GRPO, arXiv:2503.20783); r in a group of one."""
    return centre_in_groups(rewards, groups)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """r minus the mean of the other completions of its group (RLOO, arXiv:2402.14740).

    r in a group of one, which has no others.
    """
    centred = centre_in_groups(rewards, groups)
    sizes = counts(groups, number_of(groups))[groups].to(rewards.dtype)
    return centred * sizes / (sizes - 1).clamp(min=1)


def unit(rewards: Tensor) -> Tensor:
    """1 for every completion: supervised learning on what the selection kept."""
    return torch.ones_like(rewards)


def outcome_sign(rewards: Tensor, *, pass_threshold: float = 0.5) -> Tensor:
    """+1 for a completion that passes and -1 for one that does not."""
    return torch.where(rewards >= pass_threshold, 1.0, -1.0).to(rewards.dtype)


def batch_centred(rewards: Tensor) -> Tensor:
    """r - mean of the whole batch (REINFORCE with a baseline, Williams 1992); needs no groups."""
    return centre(rewards)


def batch_relative(rewards: Tensor, groups: Tensor, *, std_epsilon: float = STD_EPSILON) -> Tensor:
    """(r - group mean) / (sample std of all rewards + epsilon) (Lite PPO, arXiv:2508.08221)."""
    return scale(centre_in_groups(rewards, groups), spread(rewards), std_epsilon=std_epsilon)


def batch_rms(
    rewards: Tensor,
    groups: Tensor,
    past_squares: Tensor | None = None,
    *,
    decay: float = 0.0,
    std_epsilon: float = STD_EPSILON,
) -> Tensor:
    """(r - group mean) / (root mean square of that + epsilon) (ScaleRL, arXiv:2510.13786).

    decay: 0 takes the mean over the batch; else it is a running one, of which each completion
    replaces so large a share, this batch's included. past_squares: (2,) of `running_square` over
    the batches before; None for none.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"expected a decay in [0, 1), got {decay}; 0 is this batch alone")
    centred = centre_in_groups(rewards, groups)
    mean_square = centred.square().mean()
    if decay:
        past = rewards.new_zeros(2) if past_squares is None else past_squares
        total, weight = running_square(centred, past, decay=decay)
        mean_square = (total / weight).to(rewards)
    return scale(centred, mean_square.sqrt(), std_epsilon=std_epsilon)


def length_weighted(rewards: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """r minus the mean reward of the group's tokens (OPO, arXiv:2505.23585).

    lengths: (B,) trained tokens; an empty completion does not enter the mean. r in a group of one.
    """
    require_same_shape(rewards=rewards, lengths=lengths)
    centred = _centre_over_tokens(rewards, groups, lengths)
    return torch.where(alone(groups), rewards, centred)


def token_group_relative(
    rewards: Tensor,
    groups: Tensor,
    lengths: Tensor,
    *,
    std_epsilon: float = 1e-6,
    limit: float = 5.0,
) -> Tensor:
    """(r - mean) / (population std + epsilon) over the tokens of each group (HAPO's average).

    Heterogeneous adaptive policy optimization, from its released code. Long completions weigh
    more. lengths: (B,) trained tokens. All tokens of a completion share one value, so the result
    is (B,). A group in which the advantage of a token reaches +-limit is group_relative instead,
    and so is a group of one.
    """
    require_same_shape(rewards=rewards, lengths=lengths)
    num_groups = number_of(groups)
    centred = _centre_over_tokens(rewards, groups, lengths)
    weights = lengths.to(rewards.dtype)
    total = sums(weights, groups, num_groups).clamp(min=1)
    variances = sums(weights * centred.square(), groups, num_groups) / total
    advantages = scale(centred, variances.sqrt()[groups], std_epsilon=std_epsilon)
    too_large = ((advantages.abs() >= limit) & (lengths > 0)).to(rewards.dtype)
    falls_back = (sums(too_large, groups, num_groups) > 0)[groups] | alone(groups)
    by_completion = group_relative(rewards, groups, std_epsilon=std_epsilon)
    return torch.where(falls_back, by_completion, advantages)


def good_policy_gradient(rewards: Tensor, groups: Tensor, *, normaliser: float = 1.0) -> Tensor:
    """(B / completions with a reward) (r - group mean) / normaliser (GPG, arXiv:2504.02546).

    A completion has a reward where r is not zero; the factor makes up for the others.
    """
    num_rewarded = torch.count_nonzero(rewards).clamp(min=1)
    return centre_in_groups(rewards, groups) * rewards.numel() / num_rewarded / normaliser


def pass_at_k_max(rewards: Tensor, groups: Tensor, *, std_epsilon: float = 1e-6) -> Tensor:
    """(best - second best) / (sample std + epsilon) for the best of each group, 0 for the others.

    The gradient of the expected best of the group (pass@k training, arXiv:2503.19595). Zero where
    two share the first place; the second best of a group of one is 0.
    """
    require_same_shape(rewards=rewards, groups=groups)
    ranked = torch.argsort(rewards, descending=True, stable=True)
    ranked = ranked[torch.argsort(groups[ranked], stable=True)]  # groups in order, best first
    sizes = counts(groups, number_of(groups))
    starts = (sizes.cumsum(0) - sizes)[sizes > 0]
    best, second = ranked[starts], ranked[(starts + 1).clamp(max=rewards.numel() - 1)]
    gaps = rewards[best] - torch.where(alone(groups)[best], 0.0, rewards[second])
    advantages = torch.zeros_like(rewards)
    spreads = spread_in_groups(rewards, groups)[best]
    advantages[best] = scale(gaps, spreads, std_epsilon=std_epsilon)
    return advantages


def decoupled_rewards(
    reward_parts: Tensor,
    groups: Tensor,
    *,
    weights: tuple[float, ...] | None = None,
    std_epsilon: float = STD_EPSILON,
) -> Tensor:
    """Each reward relative to its group, summed with weights and whitened over the batch (GDPO).

    reward_parts: (R, B), NaN where a reward does not apply: that completion then gets nothing
    from it and does not enter its statistics. weights: one per reward, all 1 if None. Rewards of
    different scales count alike, as they do not where they are summed first (arXiv:2601.05242).
    """
    weights = (1.0,) * reward_parts.shape[0] if weights is None else weights
    if len(weights) != reward_parts.shape[0]:
        raise ValueError(
            f"weights must have one value per reward, {reward_parts.shape[0]}, got {len(weights)}; "
            "give them in the order of the rewards"
        )
    total = torch.zeros_like(reward_parts[0])
    for part, weight in zip(reward_parts, weights, strict=True):
        require_same_shape(reward_part=part, groups=groups)
        applies = ~part.isnan()
        if applies.any():
            relative = group_relative(part[applies], groups[applies], std_epsilon=std_epsilon)
            total[applies] += weight * relative
    return whiten(total, std_epsilon=std_epsilon)


def _centre_over_tokens(rewards: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """(B,) rewards minus the length-weighted mean of their group."""
    num_groups = number_of(groups)
    centred = centre_in_groups(rewards, groups)
    weights = lengths.to(rewards.dtype)
    total = sums(weights, groups, num_groups).clamp(min=1)
    return centred - (sums(weights * centred, groups, num_groups) / total)[groups]
