"""A config fitted to a limit, with what was changed and what else could be."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.memory.changes import WORTH, Change, changes_of, single_changes
from fastrl.memory.knobs import PATHS, Knobs, settings_of
from fastrl.memory.plan import MemoryPlan, gib
from fastrl.memory.search import Planner, fastest, knobs_for, smallest
from fastrl.memory.suggest import Suggestion, suggestions
from fastrl.memory.survey import Survey
from fastrl.memory.work import sizes_of

TIGHT = 0.02
"""Longer than before by this share, a fitted config makes suggestions worth telling."""


class Outcome(NamedTuple):
    """What `fit` found."""

    config: Config
    plan: MemoryPlan
    changes: list[Change]
    suggestions: list[Suggestion]
    slower: float
    """Time of a step by the cost model, of that of the config before; 1.3 is 30 % longer."""
    num_plans: int
    headline: str

    def lines(self) -> list[str]:
        """The changes as text."""
        return [f"{x.path} = {x.now} (was {x.was}): {x.why}" for x in self.changes]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "changes": [change._asdict() for change in self.changes],
            "suggestions": [suggestion._asdict() for suggestion in self.suggestions],
            "time_ratio": self.slower,
            "num_plans": self.num_plans,
        }


def fit(surveyed: Survey, config: Config, limit: int, name: str) -> Outcome:
    """The fastest settings within a limit; InputError with the smallest limit where none are.

    name: of what has the limit.
    """
    plan_of: Planner = surveyed.plan
    knobs = knobs_for(config, sizes_of(config), surveyed.device, plan_of)
    before = plan_of(config)
    found = fastest(knobs, limit, plan_of)
    if found is None:
        raise InputError(_impossible(knobs, limit, name, surveyed))
    own, now = knobs.candidate(knobs.own), found.candidate
    slower = 1.0 if own is None else now.cost.total / own.cost.total
    changes = changes_of(knobs, now, found.plan, plan_of)
    fitted = now.settings.of(config)
    is_tight = before.needed > limit or slower > 1 + TIGHT
    return Outcome(
        config=fitted,
        plan=found.plan,
        changes=changes,
        suggestions=_suggestions(surveyed, fitted, limit) if is_tight else [],
        slower=slower,
        num_plans=found.num_plans,
        headline=_headline(before, found.plan, limit, name, slower, len(changes)),
    )


def _suggestions(surveyed: Survey, config: Config, limit: int) -> list[Suggestion]:
    """Those worth telling: less memory by a share of WORTH, or less time within the limit."""
    now = surveyed.plan(config).needed
    found = []
    for suggestion in suggestions(config, surveyed.plan, _new_plan_of(surveyed)):
        needed, slower = suggestion.needed, suggestion.slower
        saves = needed is None or needed < (1 - WORTH) * now
        if saves or (needed is not None and needed <= limit and slower < 1 - WORTH):
            found.append(suggestion)
    return found


def _new_plan_of(surveyed: Survey) -> Planner:
    # The packages of an adapter or of 4 bits need not be here: the run may be elsewhere.
    return lambda config: Survey(config, device=surveyed.device).plan(config)


def _headline(
    before: MemoryPlan, after: MemoryPlan, limit: int, name: str, slower: float, num_changes: int
) -> str:
    if not num_changes:
        return f"nothing faster fits {name}: the config stays as it is, {gib(before.needed)} GiB"
    return (
        f"fitted to {name}, {gib(limit)} GiB: {gib(after.needed)} instead of {gib(before.needed)} "
        f"GiB, a step takes {slower:.2f} of the time by the cost model"
    )


def _impossible(knobs: Knobs, limit: int, name: str, surveyed: Survey) -> str:
    least = smallest(knobs, surveyed.plan)
    config = least.candidate.settings.of(knobs.config)
    settings = least.candidate.settings
    changed = ", ".join(
        f"{PATHS[key]} = {value}"
        for key, value in settings._asdict().items()
        if value != getattr(settings_of(knobs.config), key)
    )
    told = _suggestions(surveyed, config, limit)
    enough = [x for x in told if x.needed is not None and x.needed <= limit]
    hint = "; no single change of the mathematics is enough"
    if enough:
        hint = "; enough would be " + " or ".join(
            f"{x.setting} ({gib(x.needed or 0)} GiB)" for x in enough
        )
    return (
        f"{name} has {gib(limit)} GiB, but the smallest limit that would do is "
        f"{gib(least.plan.needed)} GiB, with {changed or 'the config as it is'}{hint}"
    )


def remedies(surveyed: Survey, config: Config) -> list[str]:
    """At most three single changes of the config that save memory, the fastest first."""
    knobs = knobs_for(config, sizes_of(config), surveyed.device, surveyed.plan)
    return [str(remedy) for remedy in single_changes(knobs, surveyed.plan)[:3]]
