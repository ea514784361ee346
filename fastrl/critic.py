"""The value model: what a policy will be rewarded from here on, before each of its tokens.

Legend: N packed tokens, S trained tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastrl.adapters import adapter_in_use, adapter_parameters, with_adapter
from fastrl.config import Config, ModelConfig
from fastrl.errors import InputError
from fastrl.integrations.value_models import read_value_model
from fastrl.methods.record import Choice, Method, training_parameter
from fastrl.packing import Plan
from fastrl.phases import ValueTerms
from fastrl.policy import Policy
from fastrl.precision import frozen_dtype, store_weights, trained_dtype
from fastrl.types import StepMetrics
from fastrl.value_losses import TRAINING, VALUE_LOSSES, squared_error
from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.shared_rows import select_rows

ADAPTER = "critic"
"""Of a value model on the policy's base."""


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
    """A value model."""

    @property
    def shares_layers(self) -> bool:
        """Whether its values are of the policy's own hidden states, so that they cost no pass."""
        ...

    @property
    def trained(self) -> nn.Module:
        """What its own optimizer steps."""
        ...

    def in_use(self) -> AbstractContextManager[None]:
        """Around `values` and their backward pass."""
        ...

    def values(self, plan: Plan, hidden_states: Tensor | None) -> Tensor:
        """(S,) before each trained token of the plan; hidden_states (N, D) of the policy."""
        ...


class SharedCritic:
    """A head on the layers of the policy, which learn from both losses."""

    shares_layers = True

    def __init__(self, policy: Policy) -> None:
        self.trained: nn.Module = new_head(policy.model, policy)

    def in_use(self) -> AbstractContextManager[None]:
        """See `Critic`."""
        return nullcontext()

    def values(self, plan: Plan, hidden_states: Tensor | None) -> Tensor:
        """See `Critic`."""
        assert hidden_states is not None
        values: Tensor = self.trained(hidden_states)
        return select_rows(values, plan.source_index)


class AdapterCritic:
    """An adapter of its own with a head, on the frozen weights below the policy's adapter."""

    shares_layers = False

    def __init__(self, policy: Policy, lora: Mapping[str, Any], *, seed: int) -> None:
        self.policy = policy
        fields = {key: value for key, value in lora.items() if key != "modules_to_save"}
        policy.model = with_adapter(policy.model, fields, seed=seed, name=ADAPTER)
        parameters = list(adapter_parameters(policy.model, ADAPTER).values())
        for parameter in parameters:
            if parameter.dtype.itemsize < 4:  # updates would be lost to rounding
                parameter.data = parameter.data.float()
            parameter.requires_grad_(False)  # but in use: the policy's optimizer leaves it alone
        self.head = new_head(policy.model, policy)
        self.trained: nn.Module = nn.ModuleList([self.head, nn.ParameterList(parameters)])

    def in_use(self) -> AbstractContextManager[None]:
        """See `Critic`; layers that are recomputed in the backward pass need the adapter too."""
        return adapter_in_use(self.policy.model, ADAPTER)

    def values(self, plan: Plan, hidden_states: Tensor | None) -> Tensor:
        """See `Critic`; takes a pass of its own."""
        values: Tensor = self.head(self.policy.hidden_states(plan))
        return select_rows(values, plan.source_index)


class ModelCritic:
    """A model of its own, of another size even, that reads the policy's tokens."""

    shares_layers = False

    def __init__(self, policy: Policy, config: ModelConfig, directory: Path) -> None:
        found = read_value_model(directory, policy.tokenizer, dtype=trained_dtype(config.precision))
        self.policy = policy
        self.body = found.body.to(policy.device).train()
        if config.gradient_checkpointing:
            self.body.gradient_checkpointing_enable({"use_reentrant": False})
        store_weights(
            self.body, trained=trained_dtype(config.precision),
            frozen=frozen_dtype(config.precision),
        )  # fmt: skip
        self.head = new_head(self.body, policy)
        if found.head is not None:
            with torch.no_grad():
                self.head.weight.copy_(found.head)
        self.trained: nn.Module = nn.ModuleList([self.head, self.body])

    def in_use(self) -> AbstractContextManager[None]:
        """See `Critic`."""
        return nullcontext()

    def values(self, plan: Plan, hidden_states: Tensor | None) -> Tensor:
        """See `Critic`; takes a pass of its own."""
        with plan.attach(self.body, source_rows_only=True), self.policy.autocast():
            states = self.body(**plan.inputs).last_hidden_state[0]
        values: Tensor = self.head(states)
        return select_rows(values, plan.source_index)


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
    kind = config.critic.model
    if kind == "head":
        return SharedCritic(policy)
    if kind == "lora":
        if not config.model.lora:
            raise InputError(
                "critic.model = 'lora' puts an adapter on frozen weights, but without model.lora "
                "the policy trains them; set model.lora, or critic.model = 'head' or a directory"
            )
        return AdapterCritic(policy, config.model.lora, seed=config.seed)
    return ModelCritic(policy, config.model, Path(kind))


def check_critic(config: Config, method: Method) -> None:
    """Raise InputError for a warm-up of the value model that leaves the policy no step."""
    assert method.value_loss is not None
    rate = training_parameter(method.value_loss, "critic_learning_rate")
    if rate < 0:
        raise InputError(
            f"objective.parameters.critic_learning_rate must be at least 0, got {rate:g}; at 0 the "
            "value model has the policy's"
        )
    steps = round(training_parameter(method.value_loss, "critic_warmup_steps"))
    if steps >= config.max_steps:
        raise InputError(
            f"method {method.name!r} trains the value model alone for {steps} steps, but max_steps "
            f"is {config.max_steps}; raise it, or set objective.parameters.critic_warmup_steps"
        )


def new_head(model: Any, policy: Policy) -> ValueHead:
    """A head for the hidden states of a model beside a policy."""
    hidden_size = model.config.get_text_config().hidden_size
    dtype = accumulation_dtype(policy.head_dtype)
    return ValueHead(hidden_size, device=policy.device, dtype=dtype)
