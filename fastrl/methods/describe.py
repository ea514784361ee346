"""What the methods are, in words: one line each, or one in full beside GRPO."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap

from fastrl.config import ObjectiveConfig
from fastrl.errors import InputError, nearest
from fastrl.methods.axes import AXES, first_line, hyper_parameters_of
from fastrl.methods.record import Choice, Method, number
from fastrl.methods.table import FAMILIES, METHODS
from fastrl.preferences import LOSSES

LEGEND = (
    "rho = p / p_old of the token, w that of the completion, s its geometric mean; delta = "
    "log(p / p_ref); A advantage, r reward, T length; L = sum of logp, D = L - L_old, "
    "D_ref = L - L_ref; sg[x] is a constant"
)
BASE = "grpo"


def lines() -> list[str]:
    """Every method by family, with its choices and its source; `*` where it lacks something."""
    known = {method.name for methods in FAMILIES.values() for method in methods}
    own = tuple(method for name, method in METHODS.items() if name not in known)
    found = []
    for title, methods in {**FAMILIES, "Registered": own}.items():
        if methods:
            found += [title, *(_line(method) for method in methods), ""]
    found += [
        "* cannot be trained yet; `fastrl methods show NAME` says what it takes",
        "",
        "Axes, which the config overrides as objective.AXIS:",
    ]
    options = {field.name for field in dataclasses.fields(ObjectiveConfig)}
    return found + [
        f"  {axis}: {', '.join(choices)}" for axis, choices in AXES.items() if axis in options
    ]


def show(name: str) -> list[str]:
    """One method: its loss, its source, every choice with its numbers, and what grpo does instead.

    Raises InputError for an unknown name, with the nearest one.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; {nearest(name, list(METHODS))}")
    method = METHODS[name]
    found = [
        f"{name}: {method.source}",
        "",
        "loss of a token, a completion or a pair:",
        f"    {method.formula}",
        f"({LEGEND})",
        "",
    ]
    for axis, choice in in_effect(method).items():
        found.append(f"{axis}: {with_numbers(axis, choice, method)}")
        found.append(f"    {first_line(axis, choice.name)}")
    for penalty in method.penalties:
        where = f" on {penalty.tokens}" if penalty.tokens else ""
        found.append(f"regulariser: {penalty.beta:g} {penalty.regulariser}{where}")
        found.append(f"    {first_line('regulariser', penalty.regulariser.name)}")
    remarks = {
        **besides(method),
        "settings": method.settings,
        "missing": method.missing and f"{method.missing}; until then it cannot be trained",
        "unverified": method.unverified,
    }
    found += [f"{key}: {text}" for key, text in remarks.items() if text]
    if name != BASE:
        found += ["", f"compared with {BASE}:"]
        found += [f"    {line}" for line in differences(method, METHODS[BASE])]
    return [wrapped for line in found for wrapped in _wrap(line)]


def in_effect(method: Method) -> dict[str, Choice]:
    """The choices that act on the loss, by axis; a loss of pairs has an average of its own."""
    found = {axis: method.choices[axis] for axis in AXES if axis in method.choices}
    if method.loss is not None and not method.penalties and not method.entropy_coef:
        del found["aggregation"]
    return found


def with_numbers(axis: str, choice: Choice, method: Method) -> str:
    """A choice with all its hyper-parameters, those of its own included."""
    numbers = {**hyper_parameters_of(axis, choice.name), **choice.parameters}
    texts = []
    for name, value in numbers.items():
        if value is inspect.Parameter.empty:
            value = f"from {method.computed.name}" if method.computed else "yours"
        elif axis == "surrogate" and method.computed and name not in choice.parameters:
            value = f"{number(value)} or from {method.computed.name}"
        texts.append(f"{name}={number(value)}")
    return f"{choice.name}({', '.join(texts)})" if texts else choice.name


def pairing_of(method: Method) -> str:
    """Name of the rule that makes the pairs; empty where there are none."""
    if method.pairing is not None:
        return method.pairing
    rule = LOSSES[method.loss.name].pairing if method.loss is not None else None
    return rule.__name__ if rule is not None else ""


def differences(method: Method, base: Method) -> list[str]:
    """One line for each axis on which two methods differ."""
    ours, theirs = _summary(method), _summary(base)
    found = []
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) == theirs.get(key):
            continue
        if key not in ours:
            found.append(f"{key}: none instead of {theirs[key]}")
        else:
            instead = f" instead of {theirs[key]}" if key in theirs else ""
            found.append(f"{key}: {ours[key]}{instead}")
    return found or ["the loss is the same"]


def _summary(method: Method) -> dict[str, str]:
    choices = in_effect(method)
    found = {axis: with_numbers(axis, choice, method) for axis, choice in choices.items()}
    if method.penalties:
        found["regulariser"] = " + ".join(str(penalty) for penalty in method.penalties)
    return {**found, **besides(method)}


def besides(method: Method) -> dict[str, str]:
    """What acts on the loss and is a choice on no axis, in words."""
    found = {
        "pairing": pairing_of(method),
        "entropy bonus": f"{method.entropy_coef:g}" if method.entropy_coef else "",
        "controllers": "; ".join(map(str, method.controllers)),
        "value model": "learns from finished completions" if method.value_tokens != "all" else "",
        "old policy": "the sampler's log-probabilities" if method.ratio_to_sampler else "",
        "cut completions": "left out" if method.mask_truncated_completions else "",
        "advantages": "of the kept completions alone" if method.advantage_after_selection else "",
        "denominator": f"{method.denominator} tokens" if method.denominator else "",
        "dynamic sampling": "other prompts for those left out" if method.dynamic_sampling else "",
        "conversations": "one turn of each, drawn by chance" if method.draws_turn else "",
        "solved prompts": f"left at {method.max_pass_rate:g}" if method.max_pass_rate else "",
    }
    return {key: text for key, text in found.items() if text}


def _wrap(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, 100, subsequent_indent=indent, break_long_words=False) or [""]


def _line(method: Method) -> str:
    marker = "*" if method.missing else " "
    choices = in_effect(method)
    shown = [axis for axis in ("loss", "advantage", "surrogate", "aggregation") if axis in choices]
    what = ", ".join(choices[axis].name for axis in shown)
    return f"  {method.name:<24}{marker} {what:<68} {method.source}"
