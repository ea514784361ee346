"""Advantages of single tokens over the values of a critic, and the values to train it on.

Legend: S trained tokens, B completions. token_rewards, values and advantages are (S,); a value is
the critic's before the token is written, and 0 after the last one. completion_index (S,) int64 is
the completion of each token, non-decreasing. Tokens that are not trained, such as observations,
are absent, so the value after an action is that before the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.scans import continues, next_in_completion, recurrence
from fastrl.advantages.statistics import require_same_shape, whiten
from fastrl.ragged import counts, number_of


def generalized_advantages(
    token_rewards: Tensor,
    values: Tensor,
    completion_index: Tensor,
    *,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
) -> Tensor:
    """Sum over later tokens of (discount gae_lambda)^distance times r + discount V' - V (GAE).

    V' is the value before the next token (arXiv:1506.02438).
    """
    next_values = next_in_completion(values, completion_index)
    differences = token_rewards + discount * next_values - values
    decays = torch.full_like(values, discount * gae_lambda)
    return recurrence(differences, decays, completion_index)


def whitened_generalized_advantages(
    token_rewards: Tensor,
    values: Tensor,
    completion_index: Tensor,
    *,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    std_epsilon: float = 1e-8,
) -> Tensor:
    """generalized_advantages whitened over all tokens (PPO, arXiv:1707.06347)."""
    advantages = generalized_advantages(
        token_rewards, values, completion_index, discount=discount, gae_lambda=gae_lambda
    )
    return whiten(advantages, std_epsilon=std_epsilon)


def value_targets(
    token_rewards: Tensor,
    values: Tensor,
    completion_index: Tensor,
    *,
    discount: float = 1.0,
    value_lambda: float = 1.0,
) -> Tensor:
    """(S,) V + generalized advantage, what the critic should say (VC-PPO, arXiv:2503.01491).

    The critic has its own value_lambda: at 1 the target is the return itself, without the bias of
    the critic, which a policy can afford and long completions multiply.
    """
    advantages = generalized_advantages(
        token_rewards, values, completion_index, discount=discount, gae_lambda=value_lambda
    )
    return advantages + values


def length_adaptive_advantages(
    token_rewards: Tensor,
    values: Tensor,
    completion_index: Tensor,
    *,
    discount: float = 1.0,
    length_factor: float = 0.05,
) -> Tensor:
    """Generalized advantages with lambda = 1 - 1 / (length_factor length) (VAPO).

    The length is that of the completion, in tokens, so the sum of the decays grows with it
    (arXiv:2504.05118). Where a completion is shorter than 1 / length_factor, lambda is 0 and not
    negative.
    """
    lengths = counts(completion_index, number_of(completion_index)).to(values.dtype)
    lambdas = (1 - 1 / (length_factor * lengths)).clamp(min=0)[completion_index]
    differences = token_rewards + discount * next_in_completion(values, completion_index) - values
    return recurrence(differences, discount * lambdas, completion_index)


def truncated_advantages(
    token_rewards: Tensor,
    values: Tensor,
    completion_index: Tensor,
    finished: Tensor,
    *,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
) -> Tensor:
    """Generalized advantages of completions that may go on later (T-PPO, arXiv:2506.15050).

    finished: (B,) bool. The value after the last token of an unfinished completion is taken to be
    that before it; a finished one is as in generalized_advantages.
    """
    goes_on = continues(completion_index)
    next_values = next_in_completion(values, completion_index)
    next_values = torch.where(goes_on | finished[completion_index], next_values, values)
    differences = token_rewards + discount * next_values - values
    decays = torch.full_like(values, discount * gae_lambda)
    return recurrence(differences, decays, completion_index)


def action_level_advantages(
    token_rewards: Tensor,
    values: Tensor,
    completion_index: Tensor,
    actions: Tensor,
    *,
    discount: float = 0.95,
    gae_lambda: float = 0.95,
) -> Tensor:
    """Generalized advantages discounted between actions, not inside them (POAD, arXiv:2405.15821).

    actions: (S,) int64 index of the action of each token within its completion. An action's reward
    is on its last token. The number of tokens that an action needs then changes nothing.
    """
    require_same_shape(completion_index=completion_index, actions=actions)
    stays = actions == actions.roll(-1)  # nothing follows the last token, so its own is unused
    discounts = torch.ones_like(values).masked_fill(~stays, discount)
    next_values = next_in_completion(values, completion_index)
    differences = token_rewards + discounts * next_values - values
    return recurrence(differences, discounts * gae_lambda, completion_index)
