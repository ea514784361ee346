"""A run beside its plan: what each phase is expected to take, whether the limit can be kept, and
what would help when it was not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

from fastrl.config import Config, ModelConfig
from fastrl.errors import InputError
from fastrl.memory.fit import remedies
from fastrl.memory.plan import GIB, MemoryPlan, Phase
from fastrl.memory.recovery import OutOfMemory, Recovery, is_out_of_memory, reason_of
from fastrl.memory.report import lines
from fastrl.memory.survey import Survey, survey
from fastrl.policy import resolve_device

T = TypeVar("T")
HELD = ("weights", "adapter", "optimizer", "reference", "value model")
"""Parts that are there all the time."""
TRAIN = ("score", "update", "step")
"""Phases of a plan that a run measures as one, under "train"."""


class Expected:
    """The plan of a run, if there can be one; `notes` say why not."""

    def __init__(self, config: Config, device: torch.device, *, before: int = 0) -> None:
        """before: bytes in use beside the policy before a run, which a CPU counts too."""
        self.config = config
        self.before = before if device.type == "cpu" else 0
        self.notes: list[str] = []
        self.survey = self._found(lambda: surveyed(config, device.type))
        self.plan = self._plan_of(config)
        self.planned = config
        """What the plan is of."""

    def _plan_of(self, config: Config) -> MemoryPlan | None:
        known = self.survey
        return None if known is None else self._found(lambda: known.plan(config))

    def _found(self, look: Callable[[], T]) -> T | None:
        """None, and a note, where the planner cannot: a run does without it."""
        try:
            return look()
        except Exception as error:  # whatever a layer raises that runs without data
            said = str(error).partition("\n")[0] or type(error).__name__
            self.notes.append(f"memory is not compared with a plan: {said}")
            return None

    @property
    def needed(self) -> int | None:
        """Bytes at the highest moment, with all that is beside tensors."""
        return None if self.plan is None else self.plan.needed + self.before

    @property
    def highest(self) -> int | None:
        """Bytes at the highest moment, as `PeakMemory` measures them."""
        return None if self.plan is None else self.plan.peak + self.before

    def follow(self, recovery: Recovery) -> None:
        """Plan anew with what memory has left of passes, and of keys and values."""
        now = as_now(self.config, recovery)
        if now != self.planned:
            self.plan, self.planned = self._plan_of(now), now

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes by the phases of a `PhaseClock`; none without a plan."""
        if self.plan is None:
            return {}
        phases = {phase.name: phase for phase in self.plan.phases}
        found = {name: phases[name].total for name in ("rollout",) if name in phases}
        if found:
            found["score"] = held(phases["rollout"])  # rewards take nothing of the device
        train = [phases[name].total for name in TRAIN if name in phases]
        if train:
            found["train"] = max(train)
        return {name: total + self.before for name, total in found.items()}

    def check(self, limit: int, given: str, smallest: Config) -> list[str]:
        """What there is to know of a limit; InputError where not even the smallest passes fit it.

        given: the limit as the user wrote it; smallest: the run with those passes.
        """
        if self.needed is None or self.needed <= limit:
            return []
        of_smallest = self._plan_of(smallest)
        least = 0 if of_smallest is None else of_smallest.needed + self.before
        if limit < least:
            raise InputError(
                f"memory_limit {given!r} is {limit / GIB:.3g} GiB, but even passes of "
                f"{smallest.max_tokens_per_pass} tokens need {least / GIB:.3g} GiB: the smallest "
                "limit that would do; raise it, or see what fastrl plan CONFIG --fit suggests"
            )
        return [
            f"the plan needs {self.needed / GIB:.3g} GiB, more than memory_limit {given}: passes "
            "that meet it are halved and done again; fastrl plan CONFIG --fit finds settings that "
            "fit from the start"
        ]

    def advice(self, recovery: Recovery | None, limit: int | None) -> list[str]:
        """The plan as it is now and the cheapest remedies, for the end of a run."""
        known, config = self.survey, self.config
        if known is None or self.plan is None:
            return self.notes
        now = config if recovery is None else as_now(config, recovery)
        found = self._found(lambda: remedies(known, now)) or []
        head = ["what would help, the cheapest first:"] if found else []
        return [*lines(self.plan, limit), *head, *(f"- {remedy}" for remedy in found)]


def surveyed(config: Config, device: str) -> Survey:
    """What plans of a run are made by; runs with the same fresh model in a process share it."""
    if config.model.path is not None:  # another model may stand there by now
        return survey(config, device=device)
    return _survey_of(json.dumps(dataclasses.asdict(config.model), sort_keys=True), device)


@lru_cache(maxsize=4)
def _survey_of(model: str, device: str) -> Survey:
    return survey(Config(model=ModelConfig(**json.loads(model))), device=device)


def held(phase: Phase) -> int:
    """Bytes of a phase that are there before and after it."""
    return sum(phase.parts.get(name, 0) for name in HELD)


def as_now(config: Config, recovery: Recovery) -> Config:
    """The configuration of a run that had begun with what memory has left of its sizes."""
    return resized(config, recovery.max_tokens_per_pass, recovery.kv_cache_gib)


def resized(config: Config, max_tokens_per_pass: int, kv_cache_gib: float | None) -> Config:
    """With other passes, and where it is given other room for keys and values."""
    rollout = config.rollout
    if kv_cache_gib is not None:
        arguments = {**rollout.engine_args, "kv_cache_gib": kv_cache_gib}
        rollout = dataclasses.replace(rollout, engine_args=arguments)
    return dataclasses.replace(config, max_tokens_per_pass=max_tokens_per_pass, rollout=rollout)


def built(make: Callable[[], T], config: Config) -> T:
    """What `make` makes before a run begins; where memory runs out, the plan says why."""
    try:
        return make()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = reason_of(error)
    lines = Expected(config, resolve_device(config.model.device)).advice(None, None)
    raise OutOfMemory("\n".join([f"no memory to load the model ({reason})", *lines]))
