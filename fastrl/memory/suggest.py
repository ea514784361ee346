"""What would save memory but changes what is computed: told, never set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.memory.cost import cost_of
from fastrl.memory.plan import gib
from fastrl.memory.search import Planner
from fastrl.memory.work import sizes_of
from fastrl.optim.make import LIBRARIES

RANK = 16
"""Of the adapters that are suggested."""


class Suggestion(NamedTuple):
    """A setting, what it does to the mathematics, and what the config would need with it."""

    setting: str
    effect: str
    needed: int | None  # bytes
    slower: float = 1.0  # time of a step by the cost model, of that without it
    remark: str = ""
    """Why it cannot be had here, where `needed` is None."""


def suggestions(config: Config, plan_of: Planner, new_plan_of: Planner) -> list[Suggestion]:
    """Those that the config does not have yet, from what changes least to what changes most.

    plan_of: of configs with the same model; new_plan_of: of those with another adapter.
    """
    sizes, found = sizes_of(config), []
    for setting, effect, change, is_new in _options(config):
        changed = change(config)
        try:
            plan = (new_plan_of if is_new else plan_of)(changed)
        except InputError as error:
            found.append(Suggestion(setting, effect, None, remark=str(error)))
            continue
        times = [cost_of(x, sizes, plan.device).update for x in (changed, config)]
        found.append(Suggestion(setting, effect, plan.needed, times[0] / times[1]))
    return found


Option = tuple[str, str, Callable[[Config], Config], bool]


def _options(config: Config) -> list[Option]:
    model, optim = config.model, config.optim
    found: list[Option] = []
    if model.precision in ("float32", "autocast") and optim.optimizer not in LIBRARIES:
        effect = "bfloat16 layers; weights and steps stay exact" if not model.lora else (
            "bfloat16 layers and adapter; steps stay exact"
        )  # fmt: skip
        found.append(("model.precision = split", effect, _model(precision="split"), False))
    if optim.in_backward != "previous_norm" and optim.optimizer not in LIBRARIES:
        effect = "gradients are clipped by the norm of the step before"
        change = _optim(in_backward="previous_norm")
        found.append(("optim.in_backward = previous_norm", effect, change, False))
    if optim.optimizer in ("adamw", "adamw_offload"):
        effect = "moments of AdamW in 8 bits, rounded by chance"
        found.append(
            ("optim.optimizer = adamw_8bit", effect, _optim(optimizer="adamw_8bit"), False)
        )
    if model.precision in ("float32", "autocast", "split") and not model.lora:
        if optim.optimizer not in LIBRARIES:
            effect = "bfloat16 weights, rounded by chance after each step"
            change = _model(precision="stochastic")
            found.append(("model.precision = stochastic", effect, change, False))
        change = _model(lora={"r": RANK}, reference="auto")
        effect = "an adapter is trained, the weights below it are frozen"
        found.append((f"model.lora = {{r = {RANK}}}", effect, change, True))
    if not model.load_in_4bit:
        change = _model(lora=model.lora or {"r": RANK}, load_in_4bit=True, reference="auto")
        name = "model.load_in_4bit = true"
        name = name if model.lora else f"{name} with model.lora = {{r = {RANK}}}"
        found.append((name, "frozen weights are rounded to 4 bits (NF4)", change, True))
    return found


def _model(**changes: Any) -> Callable[[Config], Config]:
    def change(config: Config) -> Config:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))

    return change


def _optim(**changes: Any) -> Callable[[Config], Config]:
    def change(config: Config) -> Config:
        return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **changes))

    return change


HEADER = ("setting, with all else as above", "needs", "time of an update", "what it changes")


def rows(found: list[Suggestion]) -> list[tuple[str, ...]]:
    """A line of a table for each."""
    return [
        (
            x.setting,
            "-" if x.needed is None else f"{gib(x.needed)} GiB",
            "-" if x.needed is None else f"{x.slower:.2f} x",
            x.remark or x.effect,
        )
        for x in found
    ]
