"""The objective of tokens whose log-probabilities are there already, by autograd.

S tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.objectives import Objective, evaluate

LIMIT = 20.0  # of a log-ratio before exp


class TokenLoss(NamedTuple):
    """The loss of S tokens and what it was made of; tokens of weight 0 are 0 everywhere.

    Only the loss is differentiable, with respect to logps and entropies.
    """

    loss: Tensor
    """Scalar: sum over tokens of token_weight * (objective - entropy_coef * entropy)."""
    slopes: Tensor
    """(S,) derivative of the loss with respect to each log-probability."""
    clipped: Tensor
    """(S,) bool: has an advantage, but the surrogate stopped it from learning."""
    clip_high: Tensor
    """Scalar: fraction of the tokens with a weight that are clipped and have A > 0."""
    clip_low: Tensor
    """Scalar: the same with A < 0."""
    entropy: Tensor
    """Scalar: mean entropy of the tokens with a weight, nats."""
    old_kl: Tensor
    """Scalar: mean k3 estimate of the divergence from the old policy, nats."""
    ref_kl: Tensor
    """Scalar: the same from the reference policy; 0 without one."""


def token_loss_reference(
    logps: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    objective: Objective,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> TokenLoss:
    """`token_loss` with the same arguments; autograd gives the gradients."""
    counted = token_weights != 0
    current = torch.where(counted, logps, 0).detach()
    old = current if old_logps is None else torch.where(counted, old_logps, 0)
    ref = current if ref_logps is None else torch.where(counted, ref_logps, 0)
    tokens = evaluate(objective, current, old, ref, advantages, rollout_weights)
    values, slopes = torch.where(counted, tokens.values, 0), torch.where(counted, tokens.slopes, 0)
    kept_entropies = torch.where(counted, entropies, 0)
    # The slope is the derivative of the value by construction, so a straight line through the value
    # carries both the exact loss and the exact gradient.
    losses = values + slopes * (torch.where(counted, logps, 0) - current)
    losses = losses - entropy_coef * kept_entropies
    clipped = tokens.clipped & counted
    num_tokens = counted.sum().clamp(min=1)
    return TokenLoss(
        loss=(torch.where(counted, token_weights, 0) * losses).sum(),
        slopes=torch.where(counted, token_weights, 0) * slopes,
        clipped=clipped,
        clip_high=(clipped & (advantages > 0)).sum() / num_tokens,
        clip_low=(clipped & (advantages < 0)).sum() / num_tokens,
        entropy=kept_entropies.sum().detach() / num_tokens,
        old_kl=_k3(current - old).sum() / num_tokens,
        ref_kl=_k3(current - ref).sum() / num_tokens,
    )


def _k3(log_ratio: Tensor) -> Tensor:
    log_ratio = log_ratio.clamp(-LIMIT, LIMIT)
    return torch.exp(-log_ratio) - 1 + log_ratio
