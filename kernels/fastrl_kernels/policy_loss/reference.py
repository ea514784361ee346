"""The policy loss the obvious way: all the logits, then the objective, then autograd.

S selected tokens, D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import LMHead
from fastrl_kernels.linear_logps.reference import linear_logps_reference
from fastrl_kernels.objectives import Objective, Parameter, evaluate


class PolicyLoss(NamedTuple):
    """The loss and what it was made of; rows that are ignored or of weight 0 are 0 everywhere.

    float32 (float64 for float64 inputs). Only the loss is differentiable.
    """

    loss: Tensor
    """Scalar: sum over tokens of token_weight * (objective - entropy_coef * entropy)."""
    logps: Tensor
    """(S,) log-probability of the target, nats."""
    entropies: Tensor
    """(S,) nats"""
    slopes: Tensor
    """(S,) derivative of the loss with respect to each log-probability."""
    clipped: Tensor
    """(S,) bool: has an advantage, but the surrogate stopped it from learning."""


def policy_loss_reference(
    hidden_states: Tensor,
    lm_head: LMHead | Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    objective: Objective,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy_coef: Parameter = 0.0,
) -> PolicyLoss:
    """`policy_loss` from (S, V) logits, with the same arguments; autograd gives the gradients."""
    counted = token_weights != 0
    target_ids = torch.where(counted, target_ids, -1)
    out = linear_logps_reference(hidden_states, lm_head, target_ids, temperature=temperature)
    logps, dtype = out.logps.detach(), out.logps.dtype
    counted = target_ids >= 0
    weights = torch.where(counted, token_weights.to(dtype), 0)
    tokens = evaluate(
        objective,
        logps,
        logps if old_logps is None else old_logps.to(dtype),
        None if ref_logps is None else ref_logps.to(dtype),
        advantages.to(dtype),
        None if rollout_weights is None else rollout_weights.to(dtype),
    )
    values = torch.where(counted, tokens.values, 0)
    slopes = torch.where(counted, tokens.slopes, 0)
    # The slope is the derivative of the value by construction, so a straight line through the value
    # carries both the exact loss and the exact gradient.
    losses = (
        values
        + slopes * (out.logps - logps)
        - torch.where(counted, entropy_coef * out.entropies, 0)
    )
    return PolicyLoss(
        loss=(weights * losses).sum(),
        logps=logps,
        entropies=out.entropies.detach(),
        slopes=weights * slopes,
        clipped=tokens.clipped & counted,
    )
