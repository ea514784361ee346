"""From backward passes to new weights: gradients are clipped, stepped and freed.

Gradients of several passes add up in `.grad`. A gradient that is not finite is never stepped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.optim.gradients import clip_factor, gradient_norm, norm_of, total_norm
from fastrl.optim.lean import LeanAdamW

InBackward = Literal["off", "two_phase", "previous_norm"]


class StepOutcome(NamedTuple):
    """What became of one optimizer step."""

    grad_norm: float  # before clipping; inf or nan where the gradient is not finite
    is_applied: bool  # False: the gradient is not finite, and the step was left out


class RunningNorm:
    """Clips gradients one by one, by the norm of an earlier step or of those so far if larger."""

    def __init__(self, previous_norm: float, max_norm: float) -> None:
        self.previous_norm = previous_norm
        self.max_norm = max_norm
        self._squares = 0.0

    @property
    def norm(self) -> float:
        """Of all gradients so far."""
        return math.sqrt(self._squares)

    def scale(self, gradient: Tensor) -> float | None:
        """For this one; None for the first that is not finite, and for all that come after it."""
        self._squares += float(norm_of(gradient)) ** 2
        if not math.isfinite(self._squares):
            return None
        return clip_factor(max(self.norm, self.previous_norm), self.max_norm)


class Stepper:
    """Runs the backward passes of a step and the optimizer.

    in_backward:
    - "off": all gradients exist at once; clipped by their norm.
    - "two_phase": a backward pass that measures the norm and frees each gradient, then one that
      steps each parameter as its gradient comes: exactly "off", for twice the time.
    - "previous_norm": one backward pass that steps as it goes, clipped by the norm of the last step
      or what this one has seen so far, whichever is larger. The first step measures its norm.

    The gradient of several passes is whole before the last of them begins to step: then two_phase
    is "off" at the price of "off", and previous_norm frees gradients during the last pass only.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float,
        in_backward: InBackward = "off",
    ) -> None:  # fmt: skip
        if in_backward != "off" and not isinstance(optimizer, LeanAdamW):
            raise InputError(
                f"optim.in_backward = {in_backward!r} steps parameters one by one, which "
                f"{type(optimizer).__name__} cannot; use optimizer adamw, adamw_8bit or "
                "adamw_offload"
            )
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.in_backward = in_backward
        self.previous_norm: float | None = None
        self.num_begun = 0
        """Steps in which a weight has moved, of one that failed half-way too."""

    def runs_backward_twice(self, num_passes: int) -> bool:
        """Whether the next step calls its only pass twice, so that nothing of it may be kept."""
        if num_passes != 1:
            return False
        is_first = self.previous_norm is None
        return self.in_backward == "two_phase" or (self.in_backward == "previous_norm" and is_first)

    def step(self, num_passes: int, backward: Callable[[int], None]) -> StepOutcome:
        """One optimizer step; afterwards no parameter has a gradient.

        backward: runs forward and backward pass number `index`, from 0, adding to `.grad`; called
        once with each index, in order, or twice with 0 where `runs_backward_twice`. With no passes
        the step is by the gradients that are there already.
        """
        try:
            outcome = self._step(num_passes, backward)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        if outcome.is_applied and outcome.grad_norm > 0:
            self.previous_norm = outcome.grad_norm
        return outcome

    def _step(self, num_passes: int, backward: Callable[[int], None]) -> StepOutcome:
        if self.runs_backward_twice(num_passes):
            norm = self._measure(lambda: backward(0))
            if math.isfinite(norm):
                scale = clip_factor(norm, self.max_grad_norm)
                self._step_in_backward(lambda: backward(0), lambda gradient: scale)
            return StepOutcome(norm, is_applied=math.isfinite(norm))
        if self.in_backward != "previous_norm" or self.previous_norm is None or not num_passes:
            for index in range(num_passes):
                backward(index)
            return self._step_all()
        for index in range(num_passes - 1):
            backward(index)
        running = RunningNorm(self.previous_norm, self.max_grad_norm)
        self._step_in_backward(lambda: backward(num_passes - 1), running.scale)
        return StepOutcome(running.norm, is_applied=math.isfinite(running.norm))

    def _step_all(self) -> StepOutcome:
        """By the gradients that are there, each freed once it is used."""
        parameters = [p for p in self._parameters() if p.grad is not None]
        norm = gradient_norm(p.grad for p in parameters if p.grad is not None)
        if not math.isfinite(norm):
            return StepOutcome(norm, is_applied=False)
        scale = clip_factor(norm, self.max_grad_norm)
        self.reserve(parameters)
        self.num_begun += 1
        if isinstance(self.optimizer, LeanAdamW):
            for parameter in parameters:
                self.optimizer.step_parameter(parameter, scale=scale)
                parameter.grad = None
        else:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(scale)
            self.optimizer.step()
        return StepOutcome(norm, is_applied=True)

    def reserve(self, parameters: Iterable[Tensor]) -> None:
        """Have all that stepping these takes, as far as the optimizer can say before it steps."""
        if isinstance(self.optimizer, LeanAdamW):
            self.optimizer.reserve(parameters)

    def _measure(self, backward: Callable[[], None]) -> float:
        """Norm of the gradient of one pass, of which one parameter's exists at a time.

        What the step will need of the optimizer's state is there afterwards.
        """
        norms: dict[Tensor, Tensor] = {}

        def measure(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norms[parameter] = norm_of(parameter.grad)
            parameter.grad = None

        with self._on_gradient(measure):
            backward()
        norm = total_norm([norms[p] for p in self._parameters() if p in norms])
        if math.isfinite(norm):
            self.reserve(norms)
        return norm

    def _step_in_backward(
        self, backward: Callable[[], None], scale_of: Callable[[Tensor], float | None]
    ) -> None:
        """Step each parameter when its gradient is complete; then those without one of this pass.

        scale_of: of a gradient; None where it is dropped.
        """
        optimizer, before = self.optimizer, self.num_begun
        assert isinstance(optimizer, LeanAdamW)

        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            scale = scale_of(parameter.grad)
            if scale is not None:
                self.num_begun = before + 1
                optimizer.step_parameter(parameter, scale=scale)
            parameter.grad = None

        with self._on_gradient(step):
            backward()
        for parameter in self._parameters():
            if parameter.grad is not None:
                step(parameter)

    @contextmanager
    def _on_gradient(self, action: Callable[[Tensor], None]) -> Iterator[None]:
        """Within, `action` gets each parameter as soon as its gradient is complete."""
        done: set[Tensor] = set()

        def once(parameter: Tensor) -> None:
            if parameter in done:
                raise InputError(
                    f"a parameter of shape {tuple(parameter.shape)} gets its gradient in several "
                    "backward calls of one pass; set optim.in_backward = 'off'"
                )
            done.add(parameter)
            action(parameter)

        handles = [p.register_post_accumulate_grad_hook(once) for p in self._parameters()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides the weights."""
        return {"optimizer": self.optimizer.state_dict(), "previous_norm": self.previous_norm}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it; options, such as learning rates, stay those of this object."""
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        self.previous_norm = state_dict["previous_norm"]
