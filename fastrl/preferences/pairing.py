"""Which completions are compared: rules that make pairs of the completions of each prompt.

Legend: B completions, P prompts, n pairs. Each rule maps rewards, prompt numbers and lengths, (B,)
each, to (n, 2) int64 rows (chosen, rejected), ordered by prompt. A pair with an empty completion
(length 0) is dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.preferences.lists import make_lists

PairingRule = Callable[[Tensor, Tensor, Tensor], Tensor]


def best_worst(rewards: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """The best and the worst completion of each prompt, the first of equals; none if all tie."""
    _check_rewards(rewards)
    lists = make_lists(groups, lengths > 0)
    if lists.rows.shape[1] == 0:
        return groups.new_zeros((0, 2))
    best = lists.gather(rewards, absent=-torch.inf).max(dim=1)
    worst = lists.gather(rewards, absent=torch.inf).min(dim=1)
    places = torch.stack([best.indices, worst.indices], dim=1)
    return lists.rows.gather(1, places)[best.values > worst.values]


def all_pairs(rewards: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """Every two completions of a prompt whose rewards differ."""
    _check_rewards(rewards)
    lists = make_lists(groups, lengths > 0)
    scores = lists.gather(rewards)
    both = lists.present[:, :, None] & lists.present[:, None, :]
    prompt, chosen, rejected = (both & (scores[:, :, None] > scores[:, None, :])).nonzero().T
    return torch.stack([lists.rows[prompt, chosen], lists.rows[prompt, rejected]], dim=1)


def every_two(rewards: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """Every two completions of a prompt in their order, whatever their rewards."""
    lists = make_lists(groups, lengths > 0)
    both = lists.present[:, :, None] & lists.present[:, None, :]
    prompt, first, second = both.triu(diagonal=1).nonzero().T
    return torch.stack([lists.rows[prompt, first], lists.rows[prompt, second]], dim=1)


def adjacent(rewards: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """First and second completion of a prompt, third and fourth, ..., whatever their rewards.

    The last of an odd number is in no pair. For data that already comes in (chosen, rejected)
    order, and for losses that regress on two completions.
    """
    lists = make_lists(groups, torch.ones_like(groups, dtype=torch.bool))
    num = lists.rows.shape[1] // 2 * 2
    pairs = lists.rows[:, :num].reshape(-1, 2)
    present = lists.present[:, :num].reshape(-1, 2).all(dim=1)
    pairs = pairs[present]
    return pairs[(lengths[pairs] > 0).all(dim=1)]


PAIRINGS: dict[str, PairingRule] = {
    "best_worst": best_worst,
    "all_pairs": all_pairs,
    "every_two": every_two,
    "adjacent": adjacent,
}


def _check_rewards(rewards: Tensor) -> None:
    if bool(rewards.isnan().any()):
        raise ValueError(
            f"cannot order completions by reward: {int(rewards.isnan().sum())} of "
            f"{rewards.numel()} rewards are NaN; the reward function must return numbers"
        )
