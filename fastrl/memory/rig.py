"""What trains, on "meta": the policy with its value model, its reference and their optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.config import Config
from fastrl.critic import AdapterCritic, Critic, ModelCritic, SharedCritic, new_head
from fastrl.learner import Learner
from fastrl.memory.ledger import Ledger
from fastrl.memory.model import META, MetaPolicy, layers_of, recompute
from fastrl.memory.optimizers import Kept, counted
from fastrl.methods.record import Method
from fastrl.optim import Stepper, parameter_groups
from fastrl.precision import trained_dtype
from fastrl.reference import NUM_BITS, AdapterReference, BaseReference, CopiedReference, Reference
from fastrl.weight_only import weight_only_copy

BELOW_THE_LAST = 2
"""Layers above the one whose gradient divides the backward pass in two."""


class MetaLearner(Learner):
    """A learner whose optimizers only say what they take."""

    def __init__(
        self, config: Config, policy: MetaPolicy, critic: Critic | None, *, device: str,
        ledger: Ledger,
    ) -> None:  # fmt: skip
        self.config, self.critic, self.skipped_in_a_row = config, critic, 0
        self.kept = Kept(config.optim.optimizer, config.model.precision, device)
        self.ledger = ledger
        self.stepper = self._stepper(policy.model, config.optim.in_backward)
        self.stepper.previous_norm = 1.0  # that of the steps before
        self.critic_stepper: Stepper | None = None
        if critic is not None:
            with critic.in_use():
                self.critic_stepper = self._stepper(critic.trained, "off")

    def _stepper(self, module: nn.Module, in_backward: Any) -> Stepper:
        groups = parameter_groups(module, learning_rate=1.0, weight_decay=0.0)
        optimizer = counted(groups, kept=self.kept, ledger=self.ledger)
        return Stepper(optimizer, max_grad_norm=1.0, in_backward=in_backward)

    @property
    def trained(self) -> list[Tensor]:
        """All weights that a step moves."""
        steppers = [self.stepper, *([self.critic_stepper] if self.critic_stepper else [])]
        groups = [group for stepper in steppers for group in stepper.optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"]]


def critic_on_meta(config: Config, policy: MetaPolicy, body: Any) -> Critic:
    """The value model of the configuration; body: its layers, where it is a directory's."""
    with META:
        if config.critic.model == "head":
            return SharedCritic(policy)
        if config.critic.model == "lora":
            return AdapterCritic(policy, config.model.lora, seed=0)
        critic = ModelCritic.__new__(ModelCritic)
        critic.policy, critic.body = policy, body
        if config.model.gradient_checkpointing:
            recompute(body)
        critic.head = new_head(body, policy)
        critic.trained = nn.ModuleList([critic.head, body])
        return critic


def reference_on_meta(config: Config, method: Method, policy: MetaPolicy) -> Reference:
    """The reference of the configuration, where the method has one; a copy in place of one that
    comes to the device layer by layer.
    """
    kind = config.model.reference
    if config.model.lora:
        # A warm start moves the adapter before the reference is made.
        moves = method.reference_update is not None or config.warm_start.steps > 0
        return AdapterReference(policy) if moves else BaseReference(policy)
    if kind not in NUM_BITS:
        return _Frozen(policy.frozen_copy(), kind)
    dtype = torch.bfloat16 if policy.is_half else trained_dtype(config.model.precision)
    model = weight_only_copy(policy.model, num_bits=NUM_BITS[kind], dtype=dtype)
    return _Frozen(policy.with_model(model), kind)


class _Frozen(CopiedReference):
    """A copy that is there already."""

    def __init__(self, policy: MetaPolicy, kind: str) -> None:
        self.kind, self.policy = kind, policy


def watch_gradients(ledger: Ledger, learner: MetaLearner, policy: MetaPolicy) -> list[Any]:
    """Let the ledger know gradients as such, and when the backward pass is through the upper
    layers; returns hooks to remove.
    """

    def watch(parameters: Iterable[Tensor]) -> list[Any]:
        return [
            x.register_post_accumulate_grad_hook(lambda p: ledger.tag(p.grad, "gradients"))
            for x in parameters
        ]

    hooks = watch(learner.weights)
    if learner.critic is not None and learner.critic_stepper is not None:
        with learner.critic.in_use():  # where its adapter is trained
            hooks += watch(learner.critic_stepper._parameters())
    layers = layers_of(policy.model)
    if layers is None or len(layers) <= BELOW_THE_LAST:
        return hooks
    below = layers[len(layers) - 1 - BELOW_THE_LAST]
    own = {id(parameter) for parameter in learner.weights}
    first = next((x for x in below.parameters() if id(x) in own), None)
    if first is not None:
        hooks.append(first.register_post_accumulate_grad_hook(lambda _: ledger.mark("update")))
    return hooks
