"""What learns, and how gradients become weights: the policy, and the value model beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.config import Config
from fastrl.critic import Critic
from fastrl.errors import InputError, NotFiniteError
from fastrl.integrations.schedules import make_schedule
from fastrl.optim import Stepper, make_optimizer, parameter_groups, scale_learning_rate
from fastrl.policy import Policy
from fastrl.rewards.score import NotFiniteReward
from fastrl.seeding import derive_seed

MAX_SKIPPED = 10
"""Updates that are not finite, one after another, after which a run stops."""


class Learner:
    """Holds the optimizers of the policy and of the value model, which step together or not at all.

    A value model on the layers of the policy has no weights but its head; those of the layers are
    stepped by the policy's optimizer, with the gradients of both losses.
    """

    def __init__(
        self, config: Config, policy: Policy, critic: Critic | None, *,
        critic_learning_rate: float = 0.0,
    ) -> None:  # fmt: skip
        """critic_learning_rate: of the value model's own weights; at 0 that of the policy."""
        self.config = config
        self.critic = critic
        self.schedule = make_schedule(config.optim, config.max_steps)
        rate = config.optim.learning_rate
        self.stepper = make_stepper(config, policy.model, rate, name="policy")
        self.critic_stepper: Stepper | None = None
        if critic is not None:
            rate = critic_learning_rate or rate
            with critic.in_use():
                self.critic_stepper = make_stepper(config, critic.trained, rate, name="critic")
        self.skipped_in_a_row = 0

    @property
    def weights(self) -> list[Tensor]:
        """Those of the policy that are trained."""
        return [p for group in self.stepper.optimizer.param_groups for p in group["params"]]

    @property
    def num_begun(self) -> int:
        """Optimizer steps in which a weight has moved, of one that failed half-way too."""
        of_values = 0 if self.critic_stepper is None else self.critic_stepper.num_begun
        return self.stepper.num_begun + of_values

    def copy_of_weights(self) -> list[Tensor]:
        """Where a step begins, to come back to."""
        if self.config.model.precision in ("split", "stochastic"):
            raise InputError(
                "a method that moves weights back needs them as they are, but model.precision "
                f"{self.config.model.precision!r} keeps a part of them elsewhere; use float32 or "
                "autocast"
            )
        return [weight.detach().clone() for weight in self.weights]

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides the policy's weights."""
        state: dict[str, Any] = {
            "policy": self.stepper.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        if self.critic is not None and self.critic_stepper is not None:
            state["critic"] = self.critic_stepper.state_dict()
            state["values"] = self.critic.trained.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.stepper.load_state_dict(state_dict["policy"])
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]
        if self.critic is not None and self.critic_stepper is not None:
            self.critic.trained.load_state_dict(state_dict["values"])
            self.critic_stepper.load_state_dict(state_dict["critic"])

    def set_learning_rates(self, step: int, warmup_steps: int) -> float:
        """Those of the step; the policy's schedule begins where it is trained for the first time.

        Its shape is that of a run without the steps of the value model alone, whose own goes over
        all steps.
        """
        factor = 0.0
        if step >= warmup_steps:
            shape = self.schedule
            if warmup_steps:
                shape = make_schedule(self.config.optim, self.config.max_steps - warmup_steps)
            factor = shape(step - warmup_steps)
        if self.critic_stepper is not None:
            scale_learning_rate(self.critic_stepper.optimizer, self.schedule(step))
        return scale_learning_rate(self.stepper.optimizer, factor)

    def step(
        self, num_passes: int, backward: Callable[[int], None], *, trains_policy: bool
    ) -> float:
        """One optimizer step; returns the norm of the policy's gradient, 0.0 if it is not trained.

        backward: as in `fastrl.optim.Stepper.step`; it may raise NotFiniteError itself. Raises
        NotFiniteError, with weights and optimizers as they were, where a gradient is not finite.
        """
        of_values = self.critic_stepper

        def run(index: int) -> None:
            if of_values is not None and index == 0:
                of_values.optimizer.zero_grad(set_to_none=True)
            backward(index)
            if of_values is not None and index == num_passes - 1:
                check_gradient(of_values.optimizer)
                of_values.reserve(with_gradient(of_values.optimizer))

        try:
            norm = 0.0
            if trains_policy:
                outcome = self.stepper.step(num_passes, run)
                norm = outcome.grad_norm
                if not outcome.is_applied:
                    raise NotFiniteError(f"the norm of the gradient is {norm}")
            else:
                for index in range(num_passes):
                    run(index)
            if of_values is not None:
                of_values.step(0, run)
        finally:
            if of_values is not None:
                of_values.optimizer.zero_grad(set_to_none=True)
        return norm

    def count_skipped(self, error: NotFiniteError | NotFiniteReward) -> None:
        """Remember that an update was left out; raise NotFiniteError at the last of too many."""
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            is_reward = isinstance(error, NotFiniteReward)
            raise NotFiniteError(
                f"{self.skipped_in_a_row} updates in a row were not finite ({error}); "
                f"{'mend the reward' if is_reward else 'lower the learning rate'}"
            ) from error


def make_stepper(config: Config, module: nn.Module, learning_rate: float, *, name: str) -> Stepper:
    """The configured optimizer of what trains of a module; only the policy's steps in backward."""
    is_policy = name == "policy"
    optim = config.optim
    groups = parameter_groups(module, learning_rate=learning_rate, weight_decay=optim.weight_decay)
    optimizer = make_optimizer(
        groups,
        optim,
        precision=config.model.precision,
        seed=derive_seed(config.seed, "optimizer", name),
    )
    in_backward = optim.in_backward if is_policy else "off"
    return Stepper(optimizer, max_grad_norm=optim.max_grad_norm, in_backward=in_backward)


def check_gradient(optimizer: torch.optim.Optimizer) -> None:
    """NotFiniteError if a gradient has an element that is not finite."""
    for parameter in with_gradient(optimizer):
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            raise NotFiniteError("the gradient of the value model is not finite")


def with_gradient(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that have one now."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [parameter for parameter in parameters if parameter.grad is not None]
