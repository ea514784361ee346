"""A method by name, with axes and hyper-parameters replaced; contradictions are refused."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from fastrl.advantages import NEEDS_GROUPS, PER_TOKEN
from fastrl.config import ObjectiveConfig
from fastrl.errors import InputError, nearest
from fastrl.methods.adaptation import Adaptation
from fastrl.methods.axes import AXES, hyper_parameters_of, is_whole
from fastrl.methods.inputs import check_inputs
from fastrl.methods.record import Choice, Method, Penalty
from fastrl.methods.table import METHODS
from fastrl.preferences import LOSSES
from fastrl.sequence_surrogates import SEQUENCE_SURROGATES

OVERRIDES = (
    "reward_shaping", "advantage", "selection", "token_weights", "surrogate", "aggregation",
    "rollout_correction", "loss",
)  # fmt: skip
OF_TOKENS = ("advantage", "token_weights", "surrogate", "rollout_correction")
"""Axes that a loss of pairs or groups takes the place of."""
OPTIONAL = ("reward_shaping", "selection", "token_weights", "rollout_correction")
NOTHING = "none"
"""The override that takes a method's choice on an optional axis away."""
PER_TOKEN_SURROGATES = ("geometric_token_ratio",)
"""Surrogates of sequences that take an advantage for each token."""


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
    method = _with_penalties(_with_axes(method, overrides), overrides)
    for bound in ("epsilon_low", "epsilon_high"):
        value = getattr(overrides, bound)
        if value is not None:
            method = _with_bound(method, bound, value)
    method = _with_parameters(method, overrides.parameters)
    entropy_coef = overrides.entropy_coef
    if entropy_coef is not None:
        method = dataclasses.replace(method, entropy_coef=entropy_coef)
    if overrides.mask_truncated_completions is not None:
        masks = overrides.mask_truncated_completions
        method = dataclasses.replace(method, mask_truncated_completions=masks)
    check_method(method)
    Adaptation(method)
    return method


def check_method(method: Method) -> None:
    """Raise InputError for a record that no step can train: a name, a number or an input amiss."""
    for axis, choice in method.choices.items():
        _check_choice(axis, choice)
        check_inputs(axis, choice, method.name)
    for penalty in method.penalties:
        _check_choice("regulariser", penalty.regulariser)
        if penalty.tokens is not None:
            _check_choice("tokens", penalty.tokens)
    if method.pairing is not None:
        _check_pairing(method)
    if method.ratio_to_sampler and method.rollout_correction is not None:
        raise InputError(
            f"method {method.name!r} takes its ratios to the sampler's policy already; "
            f"rollout_correction {method.rollout_correction} would count them twice, remove it"
        )
    if method.loss is not None:
        return
    name = method.surrogate.name
    known = hyper_parameters_of("surrogate", name)
    given = {**method.surrogate.parameters, **(_computed(method) if method.computed else {})}
    unset = [
        key for key, value in known.items() if value is inspect.Parameter.empty and key not in given
    ]
    if unset:
        raise InputError(
            f"surrogate {name} needs {', '.join(unset)}; set objective.parameters.{unset[0]}"
        )
    by_sequence = name in SEQUENCE_SURROGATES and name not in PER_TOKEN_SURROGATES
    if by_sequence and method.advantage.name in PER_TOKEN:
        raise InputError(
            f"surrogate {name} takes one advantage for a completion, but {method.advantage.name} "
            "gives one for each token; use geometric_token_ratio or another advantage"
        )


def check_generations(method: Method, num_generations: int) -> None:
    """Raise InputError where a method compares completions of a prompt and there is one of each."""
    if num_generations >= 2:
        return
    compares = method.loss is None and method.advantage.name in NEEDS_GROUPS
    if method.loss is not None:
        compares = "groups" in LOSSES[method.loss.name].inputs
        compares = compares or LOSSES[method.loss.name].level != "group"
    if compares:
        what = f"loss {method.loss}" if method.loss else f"advantage {method.advantage}"
        raise InputError(
            f"rollout.num_generations must be at least 2 for method {method.name!r} ({what}), "
            f"got {num_generations}; raise it or use reinforce"
        )


def _with_axes(method: Method, overrides: ObjectiveConfig) -> Method:
    chosen = {axis: getattr(overrides, axis) for axis in OVERRIDES}
    chosen = {axis: name for axis, name in chosen.items() if name is not None}
    if method.loss is not None or "loss" in chosen:
        for axis in OF_TOKENS:
            if axis in chosen:
                raise InputError(
                    f"objective.{axis} has no effect beside a loss of pairs or groups "
                    f"({chosen.get('loss') or method.loss}); remove one of them"
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
        if is_whole(owner, choice.name, name):
            if value != int(value):
                raise InputError(f"objective.parameters: {key} must be a whole number, got {value}")
            value = int(value)
        changed = Choice(choice.name, {**choice.parameters, name: value})
        method = _with_choice(method, owner, changed)
    return method


def _with_choice(method: Method, axis: str, choice: Choice | None) -> Method:
    changes: dict[str, Any] = {axis: choice}
    return dataclasses.replace(method, **changes)


def _check_choice(axis: str, choice: Choice) -> None:
    if choice.name not in AXES[axis]:
        raise InputError(
            f"unknown {axis} {choice.name!r}; {nearest(choice.name, list(AXES[axis]))}"
        )
    known = hyper_parameters_of(axis, choice.name)
    for name in choice.parameters:
        if name not in known:
            raise InputError(
                f"{axis} {choice.name} has no hyper-parameter {name!r}; it has "
                f"{', '.join(known) or 'none'}"
            )
    if axis == "surrogate":
        return
    unset = [
        name
        for name, value in known.items()
        if value is inspect.Parameter.empty and name not in choice.parameters
    ]
    if unset:
        raise InputError(
            f"{axis} {choice.name} needs {', '.join(unset)}; set objective.parameters.{unset[0]}"
        )


def _check_pairing(method: Method) -> None:
    if method.pairing not in AXES["pairing"]:
        hint = nearest(str(method.pairing), list(AXES["pairing"]))
        raise InputError(f"unknown objective.pairing {method.pairing!r}; {hint}")
    if method.loss is None or LOSSES[method.loss.name].level == "group":
        what = f"loss {method.loss}" if method.loss else f"surrogate {method.surrogate}"
        raise InputError(f"objective.pairing has no effect on {what}; remove it")


def _computed(method: Method) -> dict[str, None]:
    """Names that the rule gives: those of the surrogate's hyper-parameters without a number."""
    assert method.computed is not None
    known = hyper_parameters_of("surrogate", method.surrogate.name)
    return dict.fromkeys(name for name in known if name not in method.surrogate.parameters)
