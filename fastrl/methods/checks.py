"""What no step can train, refused before a run: names, numbers, inputs, contradictions."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fastrl.advantages import NEEDS_GROUPS, PER_TOKEN
from fastrl.errors import InputError, nearest
from fastrl.methods.axes import (
    AXES,
    LIMITS,
    SCHEDULED,
    hyper_parameters_of,
    inputs_of,
    is_text,
    is_whole,
)
from fastrl.methods.estimates import rows_to_train
from fastrl.methods.inputs import StepInputs, check_inputs
from fastrl.methods.needs import estimates_from_tokens, selects_before_tokens
from fastrl.methods.record import Choice, Method
from fastrl.preferences import LOSSES
from fastrl.schedules import Schedule
from fastrl.selection import BY_PROMPT, RESAMPLINGS
from fastrl.sequence_surrogates import SEQUENCE_SURROGATES

PER_TOKEN_SURROGATES = ("geometric_token_ratio",)
"""Surrogates of sequences that take an advantage for each token."""


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
    _check_values(method)
    _check_selection(method)
    if method.draws_turn and (method.prompt_values or method.max_pass_rate is not None):
        what = "prompt_values" if method.prompt_values else "max_pass_rate"
        raise InputError(
            f"{what} is of prompts that come again, but method {method.name!r} asks from another "
            "turn of a conversation each time; remove it"
        )
    if method.ratio_to_sampler and method.rollout_correction is not None:
        raise InputError(
            f"method {method.name!r} takes its ratios to the sampler's policy already; "
            f"rollout_correction {method.rollout_correction} would count them twice, remove it"
        )
    if method.loss is not None and method.has_advantage and method.advantage.name in PER_TOKEN:
        raise InputError(
            f"loss {method.loss} takes one advantage for a completion, but {method.advantage.name} "
            "gives one for each token; choose another advantage"
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
    compares = method.has_advantage and method.advantage.name in NEEDS_GROUPS
    if method.loss is not None:
        compares = compares or "groups" in LOSSES[method.loss.name].inputs
        compares = compares or LOSSES[method.loss.name].level != "group"
    if compares:
        what = f"loss {method.loss}" if method.loss else f"advantage {method.advantage}"
        raise InputError(
            f"rollout.num_generations must be at least 2 for method {method.name!r} ({what}), "
            f"got {num_generations}; raise it or use reinforce"
        )


def check_sizes(
    method: Method, *, num_generations: int, max_completion_length: int, num_rewards: int
) -> None:
    """Raise InputError where numbers of a method do not suit those of a run, on a made-up step."""
    num_completions = 2 * num_generations
    rewards = torch.arange(num_completions, dtype=torch.float64) % 2
    inputs = StepInputs(
        rewards=rewards,
        groups=torch.arange(num_completions) // num_generations,
        lengths=torch.full((num_completions,), max_completion_length),
        finished=torch.ones(num_completions, dtype=torch.bool),
        max_completion_length=max_completion_length,
        progress=torch.zeros((), dtype=torch.float64),
        generator=torch.Generator(),
        reward_scale=torch.ones((), dtype=torch.float64),
        reward_parts=rewards.expand(num_rewards, -1),
        ref_rewards=rewards,
        ref_groups=torch.arange(num_completions) // num_generations,
        baselines=rewards,
    )
    try:
        rows_to_train(method, inputs)
    except ValueError as error:
        raise InputError(
            f"method {method.name!r} does not suit this run: {error}; see objective.parameters"
        ) from error


def _check_choice(axis: str, choice: Choice) -> None:
    if choice.name not in AXES[axis]:
        raise InputError(
            f"unknown {axis} {choice.name!r}; {nearest(choice.name, list(AXES[axis]))}"
        )
    known = hyper_parameters_of(axis, choice.name)
    for name, value in choice.parameters.items():
        if name not in known:
            raise InputError(
                f"{axis} {choice.name} has no hyper-parameter {name!r}; it has "
                f"{', '.join(known) or 'none'}"
            )
        _check_value(axis, choice.name, name, value)
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


def _check_value(axis: str, choice: str, name: str, value: Any) -> None:
    """A hyper-parameter in its range, at both ends if it follows a schedule."""
    if isinstance(value, Schedule) and axis not in SCHEDULED:
        raise InputError(
            f"{axis} {choice}: {name} cannot follow a schedule, only what belongs to "
            f"{' or '.join(SCHEDULED)} can; give a number"
        )
    if is_text(axis, choice, name) != isinstance(value, str):
        kind = "a text" if is_text(axis, choice, name) else "a number"
        raise InputError(f"{axis} {choice}: {name} must be {kind}, got {value!r}")
    if isinstance(value, str):
        return
    for number in (value.start, value.end) if isinstance(value, Schedule) else (value,):
        if is_whole(axis, choice, name) and not float(number).is_integer():
            raise InputError(f"{axis} {choice}: {name} must be a whole number, got {number:g}")
        if name in LIMITS and number not in LIMITS[name]:
            raise InputError(f"{axis} {choice}: {name} must be {LIMITS[name]}, got {number:g}")


def _check_selection(method: Method) -> None:
    """What a record says of its selection must be possible with that one."""
    if method.denominator is not None and "token_weights" not in method.choices:
        raise InputError(
            f"denominator {method.denominator!r} has no effect on method {method.name!r}, which "
            "has no token_weights; remove it"
        )
    name = method.selection.name if method.selection is not None else "none"
    if method.dynamic_sampling and name not in BY_PROMPT:
        raise InputError(
            "dynamic_sampling replaces the prompts that a selection leaves out, one of "
            f"{', '.join(sorted(BY_PROMPT))}, but selection is {name}"
        )
    if method.dynamic_sampling and not selects_before_tokens(method):
        raise InputError(
            f"dynamic_sampling needs rewards that look at no tokens, but {method.reward_shaping} "
            "shapes them by tokens; choose another reward_shaping"
        )
    asked = inputs_of("selection", name) if method.selection is not None else ()
    by_advantage = bool({"advantages", "completion_advantages"} & set(asked))
    if method.loss is not None and (by_advantage or name in RESAMPLINGS):
        raise InputError(
            f"selection {name} needs advantages or an average of its own, but loss {method.loss} "
            "has neither; choose another selection"
        )
    if not method.advantage_after_selection:
        return
    if method.loss is not None or method.selection is None:
        raise InputError(
            f"advantage_after_selection has no effect on method {method.name!r}, which has no "
            f"{'selection' if method.selection is None else 'advantage'}; remove it"
        )
    if by_advantage or name in RESAMPLINGS or estimates_from_tokens(method):
        raise InputError(
            "advantage_after_selection needs a selection by rewards, each completion once, and an "
            f"advantage that looks at no tokens, got {method.selection} and {method.advantage}"
        )


def _check_values(method: Method) -> None:
    """Values come from a value model, which only some methods train."""
    choices = method.choices
    asks = [str(choice) for axis, choice in choices.items() if "values" in inputs_of(
        axis, choice.name) and axis != "value_loss"]  # fmt: skip
    if asks and "value_loss" not in choices:
        raise InputError(
            f"method {method.name!r}: advantage {asks[0]} needs values, which takes a critic, but "
            "the method trains none; use method 'ppo' and override its other axes"
        )
    if "value_loss" in choices and not asks:
        raise InputError(
            f"method {method.name!r} trains a critic, but advantage {method.advantage} does not "
            "look at its values; choose generalized_advantages, or a method without a critic"
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
