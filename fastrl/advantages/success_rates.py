"""Group advantages scaled by how often the prompt is solved.

Legend: B completions, P prompts. Rewards and advantages are (B,), groups (B,) int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.groups import group_relative
from fastrl.advantages.statistics import STD_FLOOR, alone, centre_in_groups, spread
from fastrl.errors import InputError
from fastrl.ragged import counts, means, number_of


def mixed(
    rewards: Tensor,
    groups: Tensor,
    *,
    threshold: float = 0.5,
    std_epsilon: float = 1e-6,
    limit: float = 10.0,
) -> Tensor:
    """4p(1-p) (r - mean) / std + (1 - 4p(1-p)) (r - mean) / mean (MAPO, arXiv:2509.18849).

    p is the part of the group whose reward exceeds the threshold: the second term takes over where
    a prompt is nearly always or never solved. It is clipped to +-limit, because it explodes as the
    mean goes to zero, and it needs rewards of at least zero. A group of one, of which p says
    nothing, has the first term alone.
    """
    if (rewards < 0).any():
        raise InputError(
            "mixed divides by the mean reward of a prompt and needs rewards of at least 0, got "
            f"{float(rewards.min())}; shift the rewards or use group_relative"
        )
    num_groups = number_of(groups)
    solved = means((rewards > threshold).to(rewards.dtype), groups, num_groups)[groups]
    certainty = torch.where(alone(groups), 0.0, 1 - 4 * solved * (1 - solved))
    mean = means(rewards, groups, num_groups)[groups]
    by_std = group_relative(rewards, groups, std_epsilon=std_epsilon)
    by_mean = centre_in_groups(rewards, groups) / (mean + std_epsilon)
    return (1 - certainty) * by_std + certainty * by_mean.clamp(-limit, limit)


def beta_normalised(rewards: Tensor, groups: Tensor, *, limit: float = 1e6) -> Tensor:
    """(r - p) / f(p), f a Beta density fitted to the success rates (BNPO, arXiv:2506.02864).

    p is the mean reward of the group, so rewards must lie in [0, 1]. The density has the parameters
    1 + a/3 and 1 + b/3, at least 1, where Beta(a, b) has the mean and the sample variance of the
    rates of all prompts. It is 1 where they determine none: a single prompt or equal rates. 1/f is
    at most limit. A group of one has the advantage r.
    """
    if ((rewards < 0) | (rewards > 1)).any():
        raise InputError(
            "beta_normalised takes mean rewards for success rates and needs rewards from 0 to 1, "
            f"got {float(rewards.min())} to {float(rewards.max())}; rescale the rewards"
        )
    num_groups = number_of(groups)
    rates = means(rewards, groups, num_groups)
    alpha, beta = _density_parameters(rates[counts(groups, num_groups) > 0])
    rates = rates.clamp(0, 1)
    log_density = torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
    log_density = log_density + torch.xlogy(alpha - 1, rates)
    log_density = log_density + torch.special.xlog1py(beta - 1, -rates)
    factors = torch.exp(-log_density).clamp(max=limit)[groups]
    centred = centre_in_groups(rewards, groups)
    return torch.where(alone(groups), rewards, centred * factors)


def _density_parameters(rates: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and beta of the density from the (P,) success rates."""
    mean, std = rates.mean(), spread(rates)
    strength = mean * (1 - mean) / std.square() - 1
    strength = torch.where(std <= STD_FLOOR, 0.0, strength)
    return 1 + (strength * mean / 3).clamp(min=0), 1 + (strength * (1 - mean) / 3).clamp(min=0)
