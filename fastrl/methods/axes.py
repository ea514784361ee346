"""The axes: every function that a method can name, and what each of them asks for."""

from __future__ import annotations

import inspect
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

from fastrl.advantages import ADVANTAGES
from fastrl.aggregation import AGGREGATIONS
from fastrl.limits import Range
from fastrl.methods.defaults import DEFAULTS
from fastrl.methods.rules import COMPUTED, TOKEN_RULES
from fastrl.preferences import LOSSES, PAIRINGS
from fastrl.reward_shaping import REWARD_SHAPINGS, TOKEN_REWARD_SHAPINGS
from fastrl.rollout_correction import CORRECTIONS
from fastrl.selection import RESAMPLINGS, SELECTIONS
from fastrl.sequence_surrogates import SEQUENCE_SURROGATES
from fastrl.thinking import THINKING
from fastrl.token_weights import TOKEN_WEIGHTS
from fastrl.value_losses import TRAINING, VALUE_LOSSES
from fastrl.values.kinds import PROMPT_VALUES
from fastrl.weight_moves import LOOK_AHEADS, REFERENCE_UPDATES
from fastrl_kernels.objectives import REGULARISERS, SURROGATES, Regulariser
from fastrl_kernels.objectives.source import arguments_of

Function = Callable[..., Any]

BESIDE: dict[str, tuple[str, ...]] = {
    "value_loss": ("values",),
    "reference_update": ("ref_logps",),
    "look_ahead": (),
}
"""Axes that are no functions of a step's vectors, and what they need a step to have."""
SURROGATE_INPUTS = ("logps", "old_logps", "advantages")

AXES: dict[str, Mapping[str, Any]] = {
    "prompt_values": PROMPT_VALUES,
    "reward_shaping": ChainMap(REWARD_SHAPINGS, TOKEN_REWARD_SHAPINGS),
    "token_reward_shaping": TOKEN_REWARD_SHAPINGS,
    "advantage": ADVANTAGES,
    "value_loss": VALUE_LOSSES,
    "selection": ChainMap(RESAMPLINGS, SELECTIONS),
    "token_weights": TOKEN_WEIGHTS,
    "surrogate": ChainMap(SURROGATES, SEQUENCE_SURROGATES),
    "computed": COMPUTED,
    "regulariser": REGULARISERS,
    "tokens": TOKEN_RULES,
    "aggregation": AGGREGATIONS,
    "rollout_correction": CORRECTIONS,
    "loss": LOSSES,
    "pairing": PAIRINGS,
    "reference_update": REFERENCE_UPDATES,
    "look_ahead": LOOK_AHEADS,
    "thinking": THINKING,
}
"""Every axis and what can be chosen on it, by name."""


def inputs_of(axis: str, name: str) -> tuple[str, ...]:
    """What a choice is a function of, by the names of the step's vectors."""
    chosen = AXES[axis][name]
    if axis == "surrogate" and name in SURROGATES:
        return SURROGATE_INPUTS
    if axis in BESIDE:
        return BESIDE[axis]
    if axis == "regulariser":
        return tuple(f"{argument}s" for argument in Regulariser(chosen).inputs)
    if axis == "loss":
        found = {"logps", "lengths", "groups", "rewards", *chosen.inputs} - {"pairs"}
        return tuple(sorted({"sum_p2" if x == "alignments" else x for x in found}))
    kinds = inspect.signature(chosen).parameters.values()
    return tuple(p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD)


def hyper_parameters_of(axis: str, name: str) -> dict[str, Any]:
    """Hyper-parameters of a choice with their published values; `inspect.Parameter.empty` if none.

    Those of a surrogate and of a regulariser, whose source is a kernel's, are in `DEFAULTS`.
    """
    chosen = AXES[axis][name]
    if (axis == "surrogate" and name in SURROGATES) or axis == "regulariser":
        inputs = SURROGATE_INPUTS if axis == "surrogate" else Regulariser(chosen).inputs
        names = (arguments_of(chosen) or ())[len(inputs) :]
        known = DEFAULTS.get(name, {})
        return {key: known.get(key, inspect.Parameter.empty) for key in names}
    function = chosen.function if axis == "loss" else chosen
    kinds = inspect.signature(function).parameters.values()
    found = {p.name: p.default for p in kinds if p.kind is p.KEYWORD_ONLY}
    return {**found, **TRAINING} if axis == "value_loss" else found


def is_whole(axis: str, name: str, key: str) -> bool:
    """Whether a hyper-parameter counts something."""
    if axis == "value_loss":
        return key.endswith("_steps")
    return _annotation(axis, name, key) in (int, "int")


def is_text(axis: str, name: str, key: str) -> bool:
    """Whether a hyper-parameter is a text; all others are numbers."""
    return _annotation(axis, name, key) in (str, "str")


def _annotation(axis: str, name: str, key: str) -> Any:
    chosen = AXES[axis][name]
    function = chosen.function if axis == "loss" else chosen
    found = inspect.signature(function).parameters.get(key)
    return None if found is None else found.annotation


LIMITS = {
    "fraction": Range(0, 1, open_low=True),
    "kept_fraction": Range(0, 1, open_low=True),
    "num_kept": Range(1),
    "multiple": Range(1),
}
"""The values of hyper-parameters that say how much is kept, wherever one has that name."""
SCHEDULED = ("selection", "token_weights")
"""Axes whose hyper-parameters may follow a schedule."""


def first_line(axis: str, name: str) -> str:
    """What a choice is, from its own documentation."""
    chosen = AXES[axis][name]
    function = chosen.function if axis == "loss" else chosen
    return " ".join((function.__doc__ or "").strip().split("\n\n")[0].split())
