"""A method by name, with axes and hyper-parameters replaced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fastrl.config import ObjectiveConfig
from fastrl.errors import InputError, nearest
from fastrl.methods.adaptation import Adaptation
from fastrl.methods.axes import AXES, hyper_parameters_of, is_text, is_whole
from fastrl.methods.checks import check_method
from fastrl.methods.needs import requirements
from fastrl.methods.record import TAKE_ADVANTAGES, Choice, Method, Penalty
from fastrl.methods.table import METHODS
from fastrl.schedules import read_schedule
from fastrl.values.kinds import SOURCES

OVERRIDES = (
    "reward_shaping", "token_reward_shaping", "advantage", "selection", "token_weights",
    "surrogate", "aggregation", "rollout_correction", "loss", "value_loss", "reference_update",
)  # fmt: skip
OF_TOKENS = ("advantage", "token_weights", "surrogate", "rollout_correction")
"""Axes that a loss of pairs or groups takes the place of."""
OPTIONAL = (
    "reward_shaping", "token_reward_shaping", "selection", "token_weights", "rollout_correction",
    "reference_update",
)  # fmt: skip
FIELDS = (
    "entropy_coef", "mask_truncated_completions", "advantage_after_selection", "denominator",
    "dynamic_sampling", "max_sampling_rounds", "max_pass_rate", "scores_from",
)  # fmt: skip
"""What a method has beside its choices and is overridden as it stands."""
NOTHING = "none"
"""The override that takes a method's choice on an optional axis away."""


def resolve_method(name: str, overrides: ObjectiveConfig) -> Method:
    """The method of that name with the given axes replaced; unknown names raise InputError."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; {nearest(name, list(METHODS))}")
    method = METHODS[name]
    if method.missing:
        raise InputError(
            f"method {name!r} also needs {method.missing}, which is not built yet; its loss is "
            f"there: set method = 'grpo' and override the axes that `fastrl methods show {name}` "
            "prints"
        )
    method = _with_penalties(_with_values(_with_axes(method, overrides)), overrides)
    for bound in ("epsilon_low", "epsilon_high"):
        value = getattr(overrides, bound)
        if value is not None:
            method = _with_bound(method, bound, value)
    method = _with_parameters(method, overrides.parameters)
    given = {name: getattr(overrides, name) for name in FIELDS}
    changes = {name: value for name, value in given.items() if value is not None}
    method = dataclasses.replace(method, **changes) if changes else method
    check_method(method)
    Adaptation(method)
    return method


def _with_axes(method: Method, overrides: ObjectiveConfig) -> Method:
    chosen = {axis: getattr(overrides, axis) for axis in OVERRIDES}
    chosen = {axis: name for axis, name in chosen.items() if name is not None}
    if method.loss is not None or "loss" in chosen:
        loss = chosen.get("loss") or str(method.loss)
        is_given = loss.partition("(")[0] in TAKE_ADVANTAGES
        for axis in OF_TOKENS:
            if axis in chosen and not (axis == "advantage" and is_given):
                raise InputError(
                    f"objective.{axis} has no effect beside a loss of pairs or groups "
                    f"({loss}); remove one of them"
                )
    if "surrogate" in chosen and chosen["surrogate"] != method.surrogate.name:
        method = dataclasses.replace(method, computed=None)
    if "loss" in chosen and (method.loss is None or chosen["loss"] != method.loss.name):
        method = dataclasses.replace(method, pairing=None)
    for axis, name in chosen.items():
        if name == NOTHING and axis in OPTIONAL:
            method = _with_choice(method, axis, None)
            continue
        if name not in AXES[axis]:
            raise InputError(
                f"unknown objective.{axis} {name!r}; {nearest(name, list(AXES[axis]))}"
            )
        current = getattr(method, axis)
        if current is None or current.name != name:
            method = _with_choice(method, axis, Choice(name))
    if overrides.pairing is not None:
        method = dataclasses.replace(method, pairing=overrides.pairing)
    return method


def _with_values(method: Method) -> Method:
    """Where values of prompts are asked for and the record names no source, the usual one."""
    asked = requirements(method)
    sources = [source for name, source in SOURCES.items() if name in asked]
    if method.prompt_values is not None or not sources:
        return method
    return dataclasses.replace(method, prompt_values=Choice(sources[0]))


def _with_penalties(method: Method, overrides: ObjectiveConfig) -> Method:
    if overrides.regulariser is not None and overrides.regulariser not in AXES["regulariser"]:
        hint = nearest(overrides.regulariser, list(AXES["regulariser"]))
        raise InputError(f"unknown objective.regulariser {overrides.regulariser!r}; {hint}")
    if overrides.beta is None and overrides.regulariser is None:
        return method
    if len(method.penalties) > 1:
        raise InputError(
            f"method {method.name!r} has {len(method.penalties)} regularisers; override none"
        )
    current = method.penalties[0] if method.penalties else Penalty(Choice("k3"), 0.0)
    beta = current.beta if overrides.beta is None else overrides.beta
    regulariser = current.regulariser
    if overrides.regulariser is not None:
        if beta == 0.0:
            raise InputError("objective.regulariser has no effect with beta 0; set objective.beta")
        regulariser = Choice(overrides.regulariser)
    penalty = dataclasses.replace(current, regulariser=regulariser, beta=beta)
    return dataclasses.replace(method, penalties=(penalty,) if beta else ())


def _with_bound(method: Method, bound: str, value: float) -> Method:
    known = hyper_parameters_of("surrogate", method.surrogate.name)
    if method.loss is not None or bound not in known:
        bounded = [name for name in AXES["surrogate"] if bound in hyper_parameters_of(
            "surrogate", name)]  # fmt: skip
        where = f"loss {method.loss}" if method.loss else f"surrogate {method.surrogate.name!r}"
        raise InputError(
            f"objective.{bound} has no effect on {where}; remove it or choose one of the "
            f"surrogates {', '.join(bounded)}"
        )
    return _with_parameters(method, {f"surrogate.{bound}": value})


def _with_parameters(method: Method, parameters: Mapping[str, Any]) -> Method:
    """Hyper-parameters by name, or by "axis.name" where several choices have one of that name."""
    for key, value in parameters.items():
        axis, _, name = key.rpartition(".")
        owners = {
            owner: choice
            for owner, choice in method.choices.items()
            if axis in ("", owner) and name in hyper_parameters_of(owner, choice.name)
        }
        if len(owners) != 1:
            known = [
                f"{owner}.{name}"
                for owner, choice in method.choices.items()
                for name in hyper_parameters_of(owner, choice.name)
            ]
            problem = "belongs to several choices" if owners else "belongs to no choice"
            raise InputError(
                f"objective.parameters: {key!r} {problem} of method {method.name!r}; there are "
                f"{', '.join(known) or 'none'}"
            )
        (owner, choice), *_ = owners.items()
        if not (is_text(owner, choice.name, name) and isinstance(value, str)):
            value = _read_parameter(key, value)
        whole = is_whole(owner, choice.name, name)
        if whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        changed = Choice(choice.name, {**choice.parameters, name: value})
        method = _with_choice(method, owner, changed)
    return method


def _read_parameter(key: str, value: Any) -> Any:
    """A number as it is, a schedule from its words."""
    if isinstance(value, str):
        try:
            return read_schedule(value)
        except InputError as error:
            raise InputError(f"objective.parameters: {key}: {error}") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise InputError(f"objective.parameters: {key} must be a number, got {value!r}")
    return value


def _with_choice(method: Method, axis: str, choice: Choice | None) -> Method:
    changes: dict[str, Any] = {axis: choice}
    return dataclasses.replace(method, **changes)
