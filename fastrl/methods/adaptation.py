"""Coefficients of a method that follow what training measures, from one step to the next."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fastrl.controllers import AdaptiveKL, DoublingKL, TargetEntropy
from fastrl.errors import InputError, nearest
from fastrl.methods.record import Choice, Method

ControllerState = dict[str, dict[str, float]]
"""Name of a controller -> what it remembers."""


class Controller(Protocol):
    """Moves one coefficient."""

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


@dataclass(frozen=True)
class Rule:
    """What a controller is made of, what it measures and which coefficient it moves."""

    make: Callable[..., Controller]  # first the coefficient's initial value, then keywords
    measure: str  # a metric of the step
    read: Callable[[Method], float]
    write: Callable[[Method, float], Method]


def _surrogate_beta(method: Method) -> float:
    return float(method.surrogate.parameters.get("beta", 0.0))


def _with_surrogate_beta(method: Method, beta: float) -> Method:
    parameters = {**method.surrogate.parameters, "beta": beta}
    return dataclasses.replace(method, surrogate=Choice(method.surrogate.name, parameters))


def _penalty_beta(method: Method) -> float:
    return method.penalties[0].beta if method.penalties else 0.0


def _with_penalty_beta(method: Method, beta: float) -> Method:
    first, *others = method.penalties
    return dataclasses.replace(method, penalties=(dataclasses.replace(first, beta=beta), *others))


def _with_entropy_coef(method: Method, coefficient: float) -> Method:
    return dataclasses.replace(method, entropy_coef=coefficient)


CONTROLLERS: dict[str, Rule] = {
    "target_entropy": Rule(
        TargetEntropy, "entropy", lambda method: method.entropy_coef, _with_entropy_coef
    ),
    "doubling_kl": Rule(DoublingKL, "old_kl/k3", _surrogate_beta, _with_surrogate_beta),
    "adaptive_kl": Rule(AdaptiveKL, "kl", _penalty_beta, _with_penalty_beta),
}
"""doubling_kl moves the surrogate's beta, adaptive_kl that of the first regulariser."""


class Adaptation:
    """The controllers of a method; with none, the method stays as it is."""

    def __init__(self, method: Method) -> None:
        self.controllers: dict[str, Any] = {}
        for choice in method.controllers:
            if choice.name not in CONTROLLERS:
                hint = nearest(choice.name, list(CONTROLLERS))
                raise InputError(f"unknown controller {choice.name!r}; {hint}")
            rule = CONTROLLERS[choice.name]
            known = list(inspect.signature(rule.make).parameters)[1:]
            unknown = [name for name in choice.parameters if name not in known]
            if unknown:
                raise InputError(
                    f"controller {choice.name} has no {unknown[0]!r}; it has {', '.join(known)}"
                )
            try:
                self.controllers[choice.name] = rule.make(rule.read(method), **choice.parameters)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"method {method.name!r}: controller {choice.name}: {error}"
                ) from error

    def update(self, method: Method, metrics: Mapping[str, float], num_completions: int) -> Method:
        """The method of the next step; a step that measured nothing moves nothing."""
        for name, controller in self.controllers.items():
            rule = CONTROLLERS[name]
            if rule.measure not in metrics:
                continue
            measured = metrics[rule.measure]
            if isinstance(controller, AdaptiveKL):
                moved = controller.update(measured, num_completions)
            else:
                moved = controller.update(measured)
            method = rule.write(method, moved)
        return method

    def state_dict(self) -> ControllerState:
        """What a checkpoint keeps."""
        return {name: controller.state_dict() for name, controller in self.controllers.items()}

    def load_state_dict(self, state: ControllerState, method: Method) -> Method:
        """Go on from a checkpoint; returns the method with the coefficients of that time."""
        for name, controller in self.controllers.items():
            if name not in state:
                continue  # a checkpoint from before the first step
            controller.load_state_dict(state[name])
            (value,) = state[name].values()
            method = CONTROLLERS[name].write(method, value)
        return method
