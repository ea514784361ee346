"""Advantages over a baseline that is known before the batch, and one such baseline.

Legend: B completions, P prompts, R reference completions. Rewards and advantages are (B,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.statistics import require_same_shape, whiten
from fastrl.errors import InputError
from fastrl.ragged import counts, means, number_of

SMALLEST_BETA = 1e-6
"""Below this the soft maximum is the maximum to the last digit."""


def baseline_centred(rewards: Tensor, baselines: Tensor) -> Tensor:
    """r - baseline: the reward of the greedy completion (ReMax, arXiv:2310.10505) or any other.

    baselines: (B,), a constant or a function of the prompt.
    """
    require_same_shape(rewards=rewards, baselines=baselines)
    return rewards - baselines


def baseline_whitened(rewards: Tensor, baselines: Tensor, *, std_epsilon: float = 1e-8) -> Tensor:
    """r - baseline, whitened over the batch (single-stream policy optimization, arXiv:2509.13232).

    baselines: (B,) the success rate that a tracker expected of each prompt before this batch.
    """
    return whiten(baseline_centred(rewards, baselines), std_epsilon=std_epsilon)


def log_mean_exp_value(ref_rewards: Tensor, ref_groups: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta log mean exp(r / beta): the best value of a prompt under a KL penalty (A*-PO).

    ref_rewards, ref_groups: (R,) rewards of the reference model's completions and their prompts.
    Returns (P,), between the mean (large beta) and the maximum (small beta), 0 for a prompt
    without any (arXiv:2505.20686). As in the released code, beta = 0 is the mean, not its limit
    the maximum, and a negative one gives 0.
    """
    require_same_shape(ref_rewards=ref_rewards, ref_groups=ref_groups)
    num_prompts = number_of(ref_groups)
    if beta < 0:
        return ref_rewards.new_zeros(num_prompts)
    if beta == 0:
        return means(ref_rewards, ref_groups, num_prompts)
    best = _largest(ref_rewards, ref_groups, num_prompts)
    if beta <= SMALLEST_BETA:
        return best
    # expm1 and log1p, because both logarithm and rewards / beta vanish as beta grows.
    excess = torch.expm1((ref_rewards - best[ref_groups]) / beta)
    return best + beta * torch.log1p(means(excess, ref_groups, num_prompts))


def reference_value_centred(
    rewards: Tensor, groups: Tensor, ref_rewards: Tensor, ref_groups: Tensor, *, beta: float = 0.5
) -> Tensor:
    """r - the log-mean-exp value of its prompt (the target of A*-PO, arXiv:2505.20686).

    ref_rewards, ref_groups: (R,) at least one completion of the reference model for every prompt.
    """
    require_same_shape(rewards=rewards, groups=groups)
    num_references = counts(ref_groups, number_of(groups))[groups]
    if (num_references == 0).any():
        missing = int(groups[num_references == 0][0])
        raise InputError(
            "every prompt needs at least one reward of a reference completion, got none for "
            f"prompt {missing}; generate them for all prompts of the batch"
        )
    return rewards - log_mean_exp_value(ref_rewards, ref_groups, beta=beta)[groups]


def _largest(values: Tensor, index: Tensor, num_owners: int) -> Tensor:
    """(num_owners,) largest value of each owner; 0 for an owner of nothing."""
    lengths = counts(index, num_owners)
    order = torch.argsort(index, stable=True)
    largest = torch.segment_reduce(values[order], "max", lengths=lengths)
    return torch.where(lengths > 0, largest, 0.0)
