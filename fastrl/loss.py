"""From a policy and its passes to log-probabilities, losses and gradients.

Legend: N packed tokens, D hidden, S trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.packing import PackedPass, Plan
from fastrl.phases import Prepared, TokenStatistics
from fastrl.policy import Policy
from fastrl.types import Batch
from fastrl_kernels import LMHead, PolicyLoss, linear_logps, policy_loss
from fastrl_kernels.objectives import Objective, Parameter


class Measured(NamedTuple):
    """The current policy's view of every token of a step."""

    statistics: list[TokenStatistics]  # of each pass
    hidden_states: Tensor | None  # (N, D) of the only pass, with gradient; None if not just one


NOT_MEASURED = Measured([], None)


def measure(policy: Policy, passes: Sequence[PackedPass], temperature: float) -> Measured:
    """Statistics of every token. The layers of a single pass run with gradient, so that they need
    not run again for the loss; those of several would not fit into memory together.
    """
    if len(passes) > 1:
        return Measured([token_statistics(policy, x.plan, temperature) for x in passes], None)
    plan = passes[0].plan
    hidden_states = policy.hidden_states(plan)
    return Measured([token_statistics(policy, plan, temperature, hidden_states)], hidden_states)


@torch.no_grad()
def token_statistics(
    policy: Policy, plan: Plan, temperature: float, hidden_states: Tensor | None = None
) -> TokenStatistics:
    """What a policy thinks of the trained tokens, without gradient.

    hidden_states: (N, D) of the plan, where the layers have run already. Their squared norms are
    those of logit_scale / temperature times the states, in which the logits are linear.
    """
    if hidden_states is None:
        hidden_states = policy.hidden_states(plan)
    head, rows = policy.lm_head, plan.source_index
    found = linear_logps(hidden_states[rows], head, plan.target_ids, temperature=temperature)
    norms = torch.linalg.vector_norm(hidden_states, dim=1, dtype=found.logps.dtype)  # (N,)
    scale = head.logit_scale / temperature
    return TokenStatistics(found, (scale * norms[rows]).square())


def backward(
    policy: Policy, ready: Prepared, temperature: float, hidden_states: Tensor | None
) -> list[PolicyLoss]:
    """Accumulate the gradient of the whole step, one pass in memory at a time.

    hidden_states: (N, D) of the only pass, with gradient, where the layers have run already.
    """
    losses = []
    for item, constants in zip(ready.passes, ready.coefficients, strict=True):
        states = policy.hidden_states(item.plan) if hidden_states is None else hidden_states
        loss = policy_pass_loss(
            states,
            policy.lm_head,
            item.batch,
            objective=constants.objective,
            temperature=temperature,
            entropy_coef=constants.entropy_coef,
        )
        loss.loss.backward()
        losses.append(loss._replace(loss=loss.loss.detach()))
    return losses


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
