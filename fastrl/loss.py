"""From hidden states to the loss of one pass.

Legend: N packed tokens, D hidden, S trained tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.types import Batch
from fastrl_kernels import LMHead, linear_logps
from fastrl_kernels.objectives import Objective, evaluate


class PassLoss(NamedTuple):
    """The share of one pass in the loss of the optimizer step, and what it was made of."""

    loss: Tensor  # scalar, differentiable
    logps: Tensor  # (S,) detached
    entropies: Tensor  # (S,) detached, nats
    values: Tensor  # (S,) detached token losses before weighting


def policy_pass_loss(
    hidden_states: Tensor, lm_head: LMHead, batch: Batch, *,
    objective: Objective, temperature: float, entropy_coef: float,
) -> PassLoss:  # fmt: skip
    """sum over tokens of weight * (objective - entropy_coef * entropy), for hidden_states (N, D).

    Without old_logps the policy is its own old policy: the ratio is 1 in value and the gradient
    that of the first step on fresh completions.
    """
    out = linear_logps(
        hidden_states[batch.source_index], lm_head, batch.target_ids, temperature=temperature
    )
    logps = out.logps.detach()
    old_logps = logps if batch.old_logps is None else batch.old_logps
    tokens = evaluate(objective, logps, old_logps, batch.ref_logps, batch.advantages)
    # The slope is the derivative of the value by construction, so a straight line through the value
    # carries both the exact loss and the exact gradient.
    losses = tokens.values + tokens.slopes * (out.logps - logps)
    if entropy_coef > 0.0:
        losses = losses - entropy_coef * out.entropies
    loss = torch.dot(batch.token_weights, losses)
    return PassLoss(loss, logps, out.entropies.detach(), tokens.values)


def supervised_pass_loss(hidden_states: Tensor, lm_head: LMHead, batch: Batch) -> Tensor:
    """Weighted negative log-likelihood of the target tokens, for hidden_states (N, D)."""
    out = linear_logps(hidden_states[batch.source_index], lm_head, batch.target_ids)
    return -torch.dot(batch.token_weights, out.logps)
