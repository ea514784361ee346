"""The value model: what a policy will be rewarded from here on, before each of its tokens.

Legend: N packed tokens, S trained tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.methods.record import Choice, training_parameter
from fastrl.packing import Plan
from fastrl.phases import ValueTerms
from fastrl.policy import Policy
from fastrl.types import StepMetrics
from fastrl.value_losses import TRAINING, VALUE_LOSSES, squared_error
from fastrl_kernels.head import accumulation_dtype


class ValueHead(nn.Module):
    """V = w h + b of final hidden states, from 0: a value model that knows nothing says 0.

    In float32 whatever the layers compute in (float64 over float64 layers).
    """

    def __init__(self, hidden_size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(N,) of hidden_states (N, D)."""
        states = hidden_states.to(self.weight.dtype)
        return nn.functional.linear(states, self.weight, self.bias)[:, 0]


class Critic(Protocol):
    """A value model with what trains of it."""

    head: ValueHead
    shares_layers: bool
    """Whether its values are of the policy's own hidden states, so that they cost no pass."""

    @property
    def trained(self) -> nn.Module:
        """What its own optimizer steps."""

    def values(self, plan: Plan, hidden_states: Tensor | None) -> Tensor:
        """(S,) before each trained token of the plan; hidden_states (N, D) of the policy."""


class SharedCritic:
    """A head on the layers of the policy, which learn from both losses."""

    shares_layers = True

    def __init__(self, head: ValueHead) -> None:
        self.head = head

    @property
    def trained(self) -> nn.Module:
        """The head; the layers are the policy's."""
        return self.head

    def values(self, plan: Plan, hidden_states: Tensor | None) -> Tensor:
        """(S,) before each trained token of the plan; hidden_states (N, D) of the policy."""
        assert hidden_states is not None
        return self.head(hidden_states)[plan.source_index]


class ValueRecord(NamedTuple):
    """What a pass showed of the value model, (S,) each."""

    terms: ValueTerms
    values: Tensor
    losses: Tensor
    clipped: Tensor  # bool


def pass_value_loss(
    choice: Choice, values: Tensor, terms: ValueTerms
) -> tuple[Tensor, ValueRecord]:
    """The share of a pass in the value loss of the optimizer step, value_coef included."""
    own = {key: value for key, value in choice.parameters.items() if key not in TRAINING}
    losses = VALUE_LOSSES[choice.name](values, terms.old_values, terms.targets, **own)
    total = training_parameter(choice, "value_coef") * torch.dot(terms.weights, losses)
    clipped = losses > squared_error(values, terms.old_values, terms.targets)
    return total, ValueRecord(terms, values.detach(), losses.detach(), clipped.detach())


def value_metrics(records: Sequence[ValueRecord]) -> StepMetrics:
    """The value model over the tokens that it learns from; old values for what it had known.

    val/var_explained: 1 - variance of the targets around the old values / variance of the targets.
    """
    if not records:
        return {}

    def gather(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).double().cpu()

    learns = gather([x.terms.weights for x in records]) != 0
    if not learns.any():
        return {}
    losses = gather([x.losses for x in records])[learns]
    clipped = gather([x.clipped for x in records])[learns]
    old = gather([x.terms.old_values for x in records])[learns]
    targets = gather([x.terms.targets for x in records])[learns]
    spread = targets.var(correction=0)
    explained = 1 - (targets - old).var(correction=0) / spread if spread > 0 else spread * 0
    return {
        "val/loss": float(losses.mean()),
        "val/clipfrac": float(clipped.mean()),
        "val/mean": float(old.mean()),
        "val/target_mean": float(targets.mean()),
        "val/var_explained": float(explained),
    }


def make_critic(config: Config, policy: Policy) -> Critic:
    """The value model that the configuration names, untrained."""
    if config.critic.model != "head":
        raise InputError(f"critic.model {config.critic.model!r} is not built yet; use 'head'")
    return SharedCritic(new_head(policy.model, policy))


def new_head(model: Any, policy: Policy) -> ValueHead:
    """A head for the hidden states of a model beside a policy."""
    hidden_size = model.config.get_text_config().hidden_size
    dtype = accumulation_dtype(policy.lm_head.weight.dtype)
    return ValueHead(hidden_size, device=policy.device, dtype=dtype)
