"""Coefficients of a method that follow what training measures, from one step to the next."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.advantages.statistics import centre_in_groups, running_square
from fastrl.controllers import (
    AdaptiveKL,
    DoublingKL,
    EntropyBreak,
    RunningRewards,
    TargetEntropy,
)
from fastrl.errors import InputError, nearest
from fastrl.methods.axes import hyper_parameters_of
from fastrl.methods.estimates import counted_only
from fastrl.methods.inputs import StepInputs
from fastrl.methods.needs import requirements
from fastrl.methods.record import Choice, Method

ControllerState = dict[str, dict[str, float]]
"""Name of a controller -> what it remembers."""
REWARDS = "running_rewards"
"""What the state calls the statistics of all rewards so far."""
SQUARES = "running_squares"
"""The same of rewards relative to their groups."""


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


def _way_back(method: Method) -> float:
    return float(method.look_ahead.parameters["way_back"]) if method.look_ahead else 0.0


def _with_way_back(method: Method, way_back: float) -> Method:
    assert method.look_ahead is not None
    parameters = {**method.look_ahead.parameters, "way_back": way_back}
    return dataclasses.replace(method, look_ahead=Choice(method.look_ahead.name, parameters))


def _reward_axis(method: Method) -> str:
    """The axis whose choice subtracts a KL from the rewards."""
    axes = ("token_reward_shaping", "reward_shaping")
    for axis in axes:
        choice = getattr(method, axis)
        if choice is not None and "beta" in choice.parameters:
            return axis
    raise ValueError("expected a reward_shaping with a beta to move, got none")


def _reward_beta(method: Method) -> float:
    return float(getattr(method, _reward_axis(method)).parameters["beta"])


def _with_reward_beta(method: Method, beta: float) -> Method:
    axis = _reward_axis(method)
    choice = getattr(method, axis)
    changes: dict[str, Any] = {axis: Choice(choice.name, {**choice.parameters, "beta": beta})}
    return dataclasses.replace(method, **changes)


def _with_entropy_coef(method: Method, coefficient: float) -> Method:
    return dataclasses.replace(method, entropy_coef=coefficient)


CONTROLLERS: dict[str, Rule] = {
    "target_entropy": Rule(
        TargetEntropy, "entropy", lambda method: method.entropy_coef, _with_entropy_coef
    ),
    "doubling_kl": Rule(DoublingKL, "old_kl/k3", _surrogate_beta, _with_surrogate_beta),
    "adaptive_kl": Rule(AdaptiveKL, "kl", _penalty_beta, _with_penalty_beta),
    "entropy_break": Rule(EntropyBreak, "entropy", _way_back, _with_way_back),
    "adaptive_reward_kl": Rule(AdaptiveKL, "objective/kl", _reward_beta, _with_reward_beta),
}
"""doubling_kl moves the surrogate's beta, adaptive_kl that of the first regulariser,
adaptive_reward_kl that of the rewards, by the KL of whole completions."""


class Adaptation:
    """The controllers of a method; with none, the method stays as it is."""

    def __init__(self, method: Method) -> None:
        self.controllers: dict[str, Any] = {}
        self.rewards = RunningRewards() if "reward_scale" in requirements(method) else None
        self.decay = _decay(method)
        self.past_squares = torch.zeros(2, dtype=torch.float64)
        """Of rewards relative to their groups, see `running_square`."""
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

    def see(self, rewards: Tensor) -> Tensor | None:
        """() standard deviation of all rewards so far, these (B,) of a step included; None where
        the method does not ask for it.
        """
        if self.rewards is None:
            return None
        self.rewards.update(rewards)
        return self.rewards.std

    def remember(self, method: Method, inputs: StepInputs) -> None:
        """Take in what the step's advantages were scaled by, for those of the next one.

        inputs: after `fastrl.methods.estimates`, which the advantages are from.
        """
        if not self.decay or inputs.advantages is None:
            return
        if method.advantage_after_selection:
            inputs = counted_only(inputs, inputs.lengths > 0)
        if not len(inputs.rewards):
            return
        centred = centre_in_groups(inputs.rewards, inputs.groups)
        self.past_squares = running_square(centred, self.past_squares, decay=self.decay)

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
        state = {name: controller.state_dict() for name, controller in self.controllers.items()}
        if self.rewards is not None:
            found = self.rewards.state_dict().items()
            state[REWARDS] = {key: float(value) for key, value in found}
        if self.decay:
            total, weight = self.past_squares.tolist()
            state[SQUARES] = {"total": total, "weight": weight}
        return state

    def load_state_dict(self, state: ControllerState, method: Method) -> Method:
        """Go on from a checkpoint; returns the method with the coefficients of that time."""
        if self.rewards is not None and REWARDS in state:
            saved = {k: torch.tensor(v, dtype=torch.float64) for k, v in state[REWARDS].items()}
            self.rewards.load_state_dict(saved)
        if self.decay and SQUARES in state:
            found = state[SQUARES]["total"], state[SQUARES]["weight"]
            self.past_squares = torch.tensor(found, dtype=torch.float64)
        for name, controller in self.controllers.items():
            if name not in state:
                continue  # a checkpoint from before the first step
            controller.load_state_dict(state[name])
            coefficient = next(iter(state[name].values()))  # what else there is belongs to the rule
            method = CONTROLLERS[name].write(method, coefficient)
        return method


def _decay(method: Method) -> float:
    """Of the running mean that advantages are scaled by; 0 where they look at one step."""
    choice = method.choices.get("advantage")
    if choice is None or choice.name != "batch_rms":
        return 0.0
    return float({**hyper_parameters_of("advantage", choice.name), **choice.parameters}["decay"])
