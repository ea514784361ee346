"""Advantages of single tokens without a critic.

Legend: S trained tokens, B completions, P prompts, T tokens of the longest completion. Advantages
are (S,). completion_index (S,) int64 is the completion of each token, non-decreasing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.scans import discounted_returns, positions, running_sums
from fastrl.advantages.statistics import alone, centre_in_groups, require_same_shape, whiten
from fastrl.ragged import means, number_of, sums


def whitened_returns(
    token_rewards: Tensor,
    completion_index: Tensor,
    *,
    discount: float = 1.0,
    std_epsilon: float = 1e-8,
) -> Tensor:
    """Discounted sum of the rewards still to come, whitened over all tokens (REINFORCE++).

    token_rewards: (S,), the completion's reward on its last token and any penalty on every one
    (arXiv:2501.03262).
    """
    returns = discounted_returns(token_rewards, completion_index, discount=discount)
    return whiten(returns, std_epsilon=std_epsilon)


def whitened_group_centred(
    rewards: Tensor, groups: Tensor, completion_index: Tensor, *, std_epsilon: float = 1e-8
) -> Tensor:
    """r - group mean for every token of a completion, whitened over all tokens.

    The REINFORCE++ baseline (arXiv:2501.03262). rewards, groups: (B,). Long completions weigh more
    in the mean and in the spread, so that tokens and not completions have mean zero.
    """
    centred = centre_in_groups(rewards, groups)[completion_index]
    return whiten(centred, std_epsilon=std_epsilon)


def optimal_token_baseline(
    token_rewards: Tensor,
    old_logps: Tensor,
    sum_p2: Tensor,
    completion_index: Tensor,
    groups: Tensor,
) -> Tensor:
    """Return minus the baseline of least variance at the token's place (optimal token baseline).

    token_rewards, old_logps, sum_p2: (S,), groups: (B,). The baseline of the t-th tokens of a group
    is the mean of their returns, each weighted by the sum over the completion's tokens up to there
    of 1 - 2p + sum p^2, the squared norm of the gradient of a log-probability by the logits.

    Completions that have ended do not enter, so a token beyond all others of its group has a zero
    advantage; that of a group of one is its return. Where all weights are zero they count alike.
    """
    require_same_shape(token_rewards=token_rewards, old_logps=old_logps, sum_p2=sum_p2)
    if not token_rewards.numel():
        return token_rewards.clone()
    returns = discounted_returns(token_rewards, completion_index)
    squared_norms = (1 - 2 * old_logps.exp() + sum_p2).clamp(min=0)
    weights = running_sums(squared_norms, completion_index)
    token_groups = groups[completion_index]
    places = positions(completion_index) * number_of(groups) + token_groups  # of time and group
    num_places = number_of(places)
    centred = returns - means(returns, places, num_places)[places]
    total = sums(weights, places, num_places)
    corrections = sums(weights * centred, places, num_places) / torch.where(total > 0, total, 1.0)
    return torch.where(alone(groups)[completion_index], returns, centred - corrections[places])
