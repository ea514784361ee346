"""Which completions to train on, judged one by one, and how often to repeat each.

Legend: B completions, P prompts, S trained tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.ragged import means, number_of
from fastrl.selection.groups import first_of_completion


def finished_only(finished: Tensor) -> Tensor:
    """(B,) bool: completions that the length limit did not cut (DAPO, arXiv:2503.14476)."""
    return finished.clone()


def multiple_of(lengths: Tensor, *, multiple: int) -> Tensor:
    """(B,) bool: the first completions with tokens, as many as `multiple` divides.

    The samples of agents with any number of turns fill whole micro-batches this way
    (IterResearch, arXiv:2511.07327). Fewer than `multiple` keep nothing.
    """
    if multiple < 1:
        raise ValueError(f"expected a multiple of at least 1, got {multiple}; raise it")
    counted = lengths > 0
    num_kept = counted.sum() // multiple * multiple
    return counted & (counted.cumsum(0) <= num_kept)


def off_policy_sequence_mask(
    completion_advantages: Tensor,
    logps: Tensor,
    rollout_logps: Tensor,
    completion_index: Tensor,
    lengths: Tensor,
    *,
    max_divergence: float = 0.5,
) -> Tensor:
    """(B,) bool: all but bad completions that the policy has left behind (DeepSeek-V3.2,
    arXiv:2512.02556).

    Left out where the advantage (B,) is negative and the mean of rollout_logp - logp over the
    completion, in nats, is above max_divergence. An infinite difference of a token counts as 20.
    """
    differences = (rollout_logps - logps).clamp(-20, 20)
    divergences = means(differences, completion_index, lengths.numel())
    return ~((completion_advantages < 0) & (divergences > max_divergence))


def explorability(
    advantages: Tensor,
    entropies: Tensor,
    completion_index: Tensor,
    lengths: Tensor,
    rewards: Tensor,
    groups: Tensor,
    *,
    max_entropy: float,
    pass_threshold: float = 1.0,
) -> Tensor:
    """(P,) how much each prompt still has to teach (DEPO): mean of |advantage| * mean entropy.

    A wrong completion whose mean entropy, in nats, is above max_entropy is noise and counts 0;
    the limit is tuned and has no published value. The method averages this over the last epochs
    of a prompt and trains on the prompts with the most.
    """
    mean_entropies = means(entropies, completion_index, lengths.numel())
    is_noise = (rewards < pass_threshold) & (mean_entropies > max_entropy)
    scores = first_of_completion(advantages, lengths).abs() * mean_entropies
    return means(torch.where(is_noise, 0, scores), groups, number_of(groups))


def resampled_by_power(
    rewards: Tensor, generator: torch.Generator, *, power: float = 2.0
) -> Tensor:
    """(B,) int64 copies of each completion, B in all, drawn with weight |reward|^power.

    One of the weighted forms of PF-PPO (arXiv:2409.06957).
    """
    return _copies(rewards.abs().pow(power), generator)


def resampled_extremes(rewards: Tensor, generator: torch.Generator) -> Tensor:
    """(B,) int64 copies of each completion, B in all: only the best and worst rewards of the batch.

    One of the weighted forms of PF-PPO (arXiv:2409.06957).
    """
    is_extreme = (rewards == rewards.max()) | (rewards == rewards.min())
    return _copies(is_extreme.to(rewards.dtype), generator)


def resampled_favouring_best(
    rewards: Tensor,
    generator: torch.Generator,
    *,
    best_weight: float = 0.4,
    other_weight: float = 0.1,
) -> Tensor:
    """(B,) int64 copies of each completion, B in all: the best of the batch weigh more.

    One of the weighted forms of PF-PPO (arXiv:2409.06957).
    """
    is_best = (rewards == rewards.max()).to(rewards.dtype)
    return _copies(other_weight + (best_weight - other_weight) * is_best, generator)


def _copies(weights: Tensor, generator: torch.Generator) -> Tensor:
    """How often each index comes up in B draws; all alike where every weight is zero."""
    weights = (weights + (weights.sum() == 0)).to(generator.device)
    drawn = torch.multinomial(weights, weights.numel(), replacement=True, generator=generator)
    return torch.bincount(drawn, minlength=weights.numel())
