"""From a policy and its passes to log-probabilities, losses and gradients.

Legend: N packed tokens, D hidden, S trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.config import Config
from fastrl.critic import Critic, ValueRecord, pass_value_loss
from fastrl.errors import InputError, NotFiniteError
from fastrl.methods.record import Choice
from fastrl.packing import PackedPass, Plan
from fastrl.phases import Prepared, TokenStatistics
from fastrl.policy import Policy
from fastrl.reference import Reference
from fastrl.types import Batch
from fastrl_kernels import LMHead, PolicyLoss, explain, linear_logps, policy_loss
from fastrl_kernels.objectives import Objective, Parameter
from fastrl_kernels.shared_rows import select_rows

WORKSPACE_MB = Config.workspace_mb
"""MiB of a loss at the head, where a caller says nothing else."""


def check_workspace(policy: Policy, workspace_mb: float) -> None:
    """Raise InputError where not even one row of logits finds room in a workspace."""
    head, size = LMHead.from_model(policy.model), policy.model.config.get_text_config().hidden_size
    row = torch.zeros(1, size, dtype=policy.head_dtype, device=policy.device)
    try:
        explain(row, head, workspace_mb=workspace_mb)
        explain(row.requires_grad_(), head, workspace_mb=workspace_mb)
    except ValueError as error:
        raise InputError(str(error)) from error


class Measured(NamedTuple):
    """The current policy's view of every token of a step."""

    statistics: list[TokenStatistics]  # of each pass
    hidden_states: Tensor | None  # (N, D) of the only pass, with gradient; None if not just one


NOT_MEASURED = Measured([], None)


def measure(
    policy: Policy, passes: Sequence[PackedPass], temperature: float, *,
    critic: Critic | None = None, keeps_graph: bool = True, workspace_mb: float = WORKSPACE_MB,
) -> Measured:  # fmt: skip
    """Statistics of every token. The layers of a single pass run with gradient, so that they need
    not run again for the loss; those of several would not fit into memory together.

    keeps_graph: False where the layers have to run again for the loss in any case.
    """
    look = partial(token_statistics, policy, critic=critic, workspace_mb=workspace_mb)
    if len(passes) > 1 or not keeps_graph:
        return Measured([look(item.plan, temperature) for item in passes], None)
    plan = passes[0].plan
    hidden_states = policy.hidden_states(plan)
    return Measured([look(plan, temperature, hidden_states)], hidden_states)


@torch.no_grad()
def token_statistics(
    policy: Policy | Reference, plan: Plan, temperature: float,
    hidden_states: Tensor | None = None, *, critic: Critic | None = None,
    workspace_mb: float = WORKSPACE_MB,
) -> TokenStatistics:  # fmt: skip
    """What a policy thinks of the trained tokens, and what a value model does, without gradient.

    hidden_states: (N, D) of the plan, where the layers have run already. Their squared norms are
    those of logit_scale / temperature times the states, in which the logits are linear.
    """
    if hidden_states is None:
        hidden_states = policy.hidden_states(plan)
    head, rows = policy.lm_head, plan.source_index
    found = linear_logps(
        hidden_states[rows], head, plan.target_ids,
        temperature=temperature, workspace_mb=workspace_mb,
    )  # fmt: skip
    norms = torch.linalg.vector_norm(hidden_states, dim=1, dtype=found.logps.dtype)  # (N,)
    scale = head.logit_scale / temperature
    values = None
    if critic is not None:
        with critic.in_use():
            values = critic.values(plan, hidden_states)
    return TokenStatistics(found, (scale * norms[rows]).square(), values)


class PassLosses(NamedTuple):
    """What one pass had for its backward pass."""

    policy: PolicyLoss | None  # None where the value model is trained alone
    values: ValueRecord | None


class PassBackward:
    """Gradients of the passes of one optimizer step, one of them in memory at a time."""

    def __init__(
        self, policy: Policy, ready: Prepared, temperature: float, hidden_states: Tensor | None, *,
        critic: Critic | None = None, value_choice: Choice | None = None,
        trains_policy: bool = True, workspace_mb: float = WORKSPACE_MB,
    ) -> None:  # fmt: skip
        """hidden_states: (N, D) of the only pass, with gradient, where the layers have run."""
        self.policy = policy
        self.ready = ready
        self.temperature = temperature
        self.hidden_states = hidden_states
        self.critic = critic
        self.value_choice = value_choice
        self.trains_policy = trains_policy
        self.workspace_mb = workspace_mb
        self.losses: list[PassLosses] = []

    def __call__(self, index: int) -> None:
        """Add the gradient of pass number `index`, from 0; from 0 again to begin anew.

        Raises NotFiniteError before any gradient of a loss that is not finite.
        """
        if index == 0:
            self.losses.clear()
        item, constants = self.ready.passes[index], self.ready.coefficients[index]
        states = self._hidden_states(item.plan)
        found, total = None, None
        if self.trains_policy:
            assert states is not None
            found = policy_pass_loss(
                states,
                self.policy.lm_head,
                item.batch,
                objective=constants.objective,
                temperature=self.temperature,
                entropy_coef=constants.entropy_coef,
                workspace_mb=self.workspace_mb,
            )
            total = found.loss
            found = found._replace(loss=total.detach())
        record = None
        if self.critic is not None and self.critic.shares_layers:
            value_loss, record = self._value_loss(index, states)
            total = value_loss if total is None else total + value_loss
        if total is not None:
            _backward(total)
        if self.critic is not None and not self.critic.shares_layers:
            with self.critic.in_use():
                value_loss, record = self._value_loss(index, None)
                _backward(value_loss)
        self.losses.append(PassLosses(found, record))

    def _hidden_states(self, plan: Plan) -> Tensor | None:
        if self.hidden_states is not None:
            return self.hidden_states if self.trains_policy else self.hidden_states.detach()
        if self.trains_policy:
            return self.policy.hidden_states(plan)
        if self.critic is None or not self.critic.shares_layers:
            return None
        with torch.no_grad():  # the policy stands still, and its layers are the policy
            return self.policy.hidden_states(plan)

    def _value_loss(self, index: int, states: Tensor | None) -> tuple[Tensor, ValueRecord]:
        assert self.critic is not None
        assert self.value_choice is not None
        values = self.critic.values(self.ready.passes[index].plan, states)
        return pass_value_loss(self.value_choice, values, self.ready.values[index])


def backward(
    policy: Policy, ready: Prepared, temperature: float, hidden_states: Tensor | None
) -> list[PolicyLoss]:
    """Add the gradient of a whole optimizer step of the policy; the loss of each pass."""
    run = PassBackward(policy, ready, temperature, hidden_states)
    for index in range(len(ready.passes)):
        run(index)
    return [found.policy for found in run.losses if found.policy is not None]


def _backward(loss: Tensor) -> None:
    if not bool(torch.isfinite(loss)):
        raise NotFiniteError(f"the loss of a pass is {float(loss)}")
    loss.backward()


def policy_pass_loss(
    hidden_states: Tensor, lm_head: LMHead, batch: Batch, *,
    objective: Objective, temperature: float, entropy_coef: Parameter,
    workspace_mb: float = WORKSPACE_MB,
) -> PolicyLoss:  # fmt: skip
    """The share of one pass in the loss of the optimizer step, for hidden_states (N, D).

    Without old_logps the policy is its own old policy: the ratio is 1 in value and the gradient
    that of the first step on fresh completions.
    """
    return policy_loss(
        select_rows(hidden_states, batch.source_index),
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
        workspace_mb=workspace_mb,
    )


def supervised_pass_loss(
    hidden_states: Tensor, lm_head: LMHead, batch: Batch, *, workspace_mb: float = WORKSPACE_MB
) -> Tensor:
    """Weighted negative log-likelihood of the target tokens, for hidden_states (N, D)."""
    out = linear_logps(
        select_rows(hidden_states, batch.source_index),
        lm_head,
        batch.target_ids,
        workspace_mb=workspace_mb,
    )
    return -torch.dot(batch.token_weights, out.logps)
