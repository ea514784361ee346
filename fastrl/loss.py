"""From hidden states to the loss of one pass.

Legend: N packed tokens, D hidden, S trained tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.types import Batch
from fastrl_kernels import LMHead, PolicyLoss, linear_logps, policy_loss
from fastrl_kernels.objectives import Objective, Parameter


def policy_pass_loss(
    hidden_states: Tensor, lm_head: LMHead, batch: Batch, *,
    objective: Objective, temperature: float, entropy_coef: Parameter,
) -> PolicyLoss:  # fmt: skip
    """The share of one pass in the loss of the optimizer step, for hidden_states (N, D).

    Without old_logps the policy is its own old policy: the ratio is 1 in value and the gradient
    that of the first step on fresh completions.
    """
    return policy_loss(
        hidden_states[batch.source_index],
        lm_head,
        batch.target_ids,
        batch.advantages,
        batch.token_weights,
        objective=objective,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        rollout_weights=batch.rollout_weights,
        temperature=temperature,
        entropy_coef=entropy_coef,
    )


def supervised_pass_loss(hidden_states: Tensor, lm_head: LMHead, batch: Batch) -> Tensor:
    """Weighted negative log-likelihood of the target tokens, for hidden_states (N, D)."""
    out = linear_logps(hidden_states[batch.source_index], lm_head, batch.target_ids)
    return -torch.dot(batch.token_weights, out.logps)
