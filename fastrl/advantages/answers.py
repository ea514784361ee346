"""Advantages that look at which completions of a prompt gave the same answer.

Legend: B completions, P prompts, M sets, K completions of a set. Rewards and advantages are (B,),
groups (B,) int64. clusters (B,) int64 names the answer of each completion; the numbers mean
something within a prompt only.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fastrl.advantages.groups import group_relative
from fastrl.advantages.statistics import STD_EPSILON, centre, require_same_shape, whiten
from fastrl.ragged import counts, means, number_of


def consistency_blended(
    rewards: Tensor,
    groups: Tensor,
    clusters: Tensor,
    *,
    sharpness: float = 20.0,
    entropy_threshold: float = 1.5,
    std_epsilon: float = STD_EPSILON,
) -> Tensor:
    """w group_relative + (1 - w) the prompt's mean reward whitened over prompts (COPO).

    w = sigmoid(sharpness (entropy - entropy_threshold)), the entropy in nats of the answers of the
    prompt (arXiv:2508.04138): where all agree, the prompt as a whole is compared with the others.
    """
    entropies = answer_entropies(groups, clusters)
    num_groups = number_of(groups)
    prompt_rewards = means(rewards, groups, num_groups)
    exists = counts(groups, num_groups) > 0
    prompt_advantages = torch.zeros_like(prompt_rewards)
    prompt_advantages[exists] = whiten(prompt_rewards[exists], std_epsilon=std_epsilon)
    local = group_relative(rewards, groups, std_epsilon=std_epsilon)
    weights = torch.sigmoid(sharpness * (entropies - entropy_threshold)).to(rewards.dtype)
    return weights * local + (1 - weights) * prompt_advantages[groups]


def uncertainty_scaled(
    rewards: Tensor,
    groups: Tensor,
    clusters: Tensor,
    *,
    strength: float = 0.5,
    std_epsilon: float = STD_EPSILON,
) -> Tensor:
    """group_relative (1 - strength entropy / log G) (SEED-GRPO, arXiv:2505.12346).

    The entropy of the answers over its largest value, in [0, 1]: prompts that the policy is unsure
    of move it less. The paper divides by no maximum and has a strength of 0.02.
    """
    entropies = answer_entropies(groups, clusters)
    sizes = counts(groups, number_of(groups))[groups]
    largest = torch.log(sizes.clamp(min=2).double())
    factors = 1 - strength * (entropies / largest).to(rewards.dtype)
    return group_relative(rewards, groups, std_epsilon=std_epsilon) * factors


def answer_entropies(groups: Tensor, clusters: Tensor) -> Tensor:
    """(B,) float64 entropy in nats of the answers to each completion's prompt."""
    require_same_shape(groups=groups, clusters=clusters)
    num_groups = number_of(groups)
    answers = torch.unique(clusters, return_inverse=True)[1]
    pairs = torch.unique(groups * number_of(answers) + answers, return_inverse=True)[1]
    same_answer = counts(pairs, number_of(pairs))[pairs]
    shares = same_answer.double() / counts(groups, num_groups)[groups]
    return means(-shares.log(), groups, num_groups)[groups]


def set_relative(
    rewards: Tensor,
    groups: Tensor,
    clusters: Tensor,
    generator: torch.Generator,
    *,
    set_size: int = 4,
    num_sets: int = 128,
) -> Tensor:
    """Mean over the sets of a completion of the set's score minus the mean score (polychromic).

    A set is set_size completions of one prompt, all of them in a smaller group; its score is its
    mean reward times the part of its answers that are distinct, so that only rewards from 0 to 1
    make diversity a gain. Every set is used where there are at most num_sets, else num_sets
    random ones; a completion in none of them gets 0, and so does a group of one set.
    """
    require_same_shape(rewards=rewards, groups=groups, clusters=clusters)
    if set_size < 1 or num_sets < 1:
        raise ValueError(
            f"set_size and num_sets must be at least 1, got {set_size} and {num_sets}; raise them"
        )
    advantages = torch.zeros_like(rewards)
    for group in torch.unique(groups).tolist():
        members = (groups == group).nonzero().flatten()
        sets = _sets(members.numel(), set_size, num_sets, generator).to(rewards.device)
        advantages[members] = _means_over_sets(rewards[members], clusters[members], sets)
    return advantages


def _sets(size: int, set_size: int, num_sets: int, generator: torch.Generator) -> Tensor:
    """(M, K) members of each set of a group."""
    set_size = min(set_size, size)
    if math.comb(size, set_size) <= num_sets:
        return torch.tensor(list(itertools.combinations(range(size), set_size)))
    keys = torch.rand(num_sets, size, generator=generator, device=generator.device)
    return keys.argsort(dim=1, stable=True)[:, :set_size]


def _means_over_sets(rewards: Tensor, clusters: Tensor, sets: Tensor) -> Tensor:
    """Mean centred score of the sets of each completion of one group."""
    answers = clusters[sets].sort(dim=1).values  # (M, K)
    num_distinct = 1 + (answers.diff(dim=1) != 0).sum(dim=1)
    scores = rewards[sets].mean(dim=1) * num_distinct / sets.shape[1]
    is_member = rewards.new_zeros(sets.shape[0], rewards.numel()).scatter_(1, sets, 1.0)
    totals = (centre(scores).unsqueeze(1) * is_member).sum(dim=0)
    return totals / is_member.sum(dim=0).clamp(min=1)
