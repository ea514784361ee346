"""Which completions to train on, judged by the rewards of their group.

Legend: B completions, P prompts, S trained tokens. Every rule returns (B,) bool, True where the
completion is kept. One that is not kept leaves every average as well: its length becomes 0.
Rewards are finite; groups may be ragged and in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.ragged import counts, means, number_of
from fastrl.selection.ranking import alike, largest_spread, ranks


def nonzero_std(rewards: Tensor, groups: Tensor) -> Tensor:
    """Groups whose rewards differ (DAPO, arXiv:2503.14476).

    Without new rollouts in place of the others this is the zero-variance filter of ScaleRL
    (arXiv:2510.13786). A group of one is kept: it has no spread that could be zero.
    """
    sizes = counts(groups, number_of(groups))
    return ~(alike(rewards, groups) & (sizes > 1))[groups]


def pass_window(
    rewards: Tensor,
    groups: Tensor,
    *,
    lowest: float,
    highest: float,
    pass_threshold: float = 1.0,
) -> Tensor:
    """Groups of which at least `lowest` and at most `highest` of the completions pass.

    Both ends are fractions in [0, 1] and inside; a completion passes at `pass_threshold`.
    """
    if not 0 <= lowest <= highest <= 1:
        raise ValueError(
            f"expected 0 <= lowest <= highest <= 1 for the window of pass rates, got "
            f"lowest={lowest} and highest={highest}; give both as fractions"
        )
    passed = (rewards >= pass_threshold).double()
    pass_rates = means(passed, groups, number_of(groups))
    return ((pass_rates >= lowest) & (pass_rates <= highest))[groups]


def max_variance(rewards: Tensor, groups: Tensor, *, num_kept: int = 16) -> Tensor:
    """The num_kept rewards of each group with the largest variance (PODS, arXiv:2504.13818).

    Published with 64 generations, and advantages that are formed from the kept rewards alone.
    """
    return largest_spread(rewards, groups, _positive(num_kept))


def max_variance_advantages(
    completion_advantages: Tensor,
    groups: Tensor,
    lengths: Tensor,
    *,
    num_kept: int = 8,
    kept_fraction: float = 0.25,
) -> Tensor:
    """Advantages of largest variance, first in each group, then in the batch (arXiv:2509.22115).

    Of each group num_kept stay, published with 16 generations; of those, as many as
    `kept_fraction` of all completions with tokens, at least one. Published to grow during
    training. completion_advantages: (B,), that of the first token where tokens have their own;
    they are not formed again afterwards. Completions without tokens are not kept.
    """
    if not 0 < kept_fraction <= 1:
        raise ValueError(
            f"expected kept_fraction in (0, 1], got {kept_fraction}; it is a fraction of the batch"
        )
    values = completion_advantages
    candidates = (lengths > 0).nonzero().flatten()
    num_in_batch = max(1, int(kept_fraction * len(candidates) + 1e-9))  # 0.3 * 10 is below 3
    in_group = largest_spread(values[candidates], groups[candidates], _positive(num_kept))
    candidates = candidates[in_group]
    whole_batch = torch.zeros_like(candidates)
    in_batch = largest_spread(values[candidates], whole_batch, num_in_batch)
    kept = torch.zeros_like(lengths, dtype=torch.bool)
    return kept.index_fill(0, candidates[in_batch], True)


def top_rewards(rewards: Tensor, groups: Tensor, *, num_kept: int) -> Tensor:
    """The num_kept best of each group, ties to the lower index (RAFT, arXiv:2304.06767)."""
    return ranks(rewards, groups) < _positive(num_kept)


def best(rewards: Tensor, groups: Tensor) -> Tensor:
    """The best of each group (PF-PPO, arXiv:2409.06957)."""
    return ranks(rewards, groups) == 0


def best_and_worst(rewards: Tensor, groups: Tensor) -> Tensor:
    """The best and the worst of each group (PF-PPO, arXiv:2409.06957)."""
    places = ranks(rewards, groups)
    sizes = counts(groups, number_of(groups))
    return (places == 0) | (places == sizes[groups] - 1)


def best_and_random(rewards: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """The best of each group and one of the others by chance (PF-PPO, arXiv:2409.06957)."""
    draws = torch.rand(groups.numel(), generator=generator, device=generator.device)
    is_best = best(rewards, groups)
    return ranks(torch.where(is_best, 2.0, draws.to(groups.device)), groups) <= 1


def first_of_completion(values: Tensor, lengths: Tensor) -> Tensor:
    """(B,) value of the first token of each completion, from (S,); 0 where it has no tokens."""
    if values.numel() == 0:
        return values.new_zeros(lengths.shape)
    starts = (lengths.cumsum(0) - lengths).clamp(max=values.numel() - 1)
    return torch.where(lengths > 0, values[starts], 0)


def _positive(num_kept: int) -> int:
    if num_kept < 1:
        raise ValueError(f"expected num_kept of at least 1 per group, got {num_kept}; raise it")
    return num_kept
