"""What each change of a fitted config gives, and the single changes that would help a config most.

A change is judged by taking it back: what the config would need and how long a step would take with
all the others alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastrl.errors import InputError
from fastrl.memory.knobs import PATHS, ROUNDED, Candidate, Knobs, Settings
from fastrl.memory.plan import GIB, MemoryPlan, gib
from fastrl.memory.search import Planner

TOGETHER = {"offloading": "checkpointing"}
"""Settings that are changed with another one."""
WHY = {
    "max_tokens_per_pass": "activations of a pass",
    "workspace_mb": "rows of logits at once",
    "checkpointing": "activations are computed again in the backward pass",
    "mlp_chunk_size": "MLPs keep a chunk of a pass",
    "optimizer": "moments are in the memory of the CPU and visit the GPU",
    "in_backward": "no gradient outlives its step; every pass runs twice",
    "reference": "where the reference policy is",
    "kv_cache_gib": "keys and values at once; what finds no room waits",
}
ROUNDS = "rounds the reference policy, and with it the KL to it"
WORTH = 0.02
"""Of what a config needs, or of its time: what saves less is not worth telling."""


class Change(NamedTuple):
    """One setting, and what the config would be without the change."""

    path: str
    was: str
    now: str
    why: str
    needed: int | None
    """Bytes without it; None where it cannot be taken back alone."""
    slower: float
    """How much longer a step takes with it: 1.3 is 30 % longer, 0.9 a tenth shorter."""


def changes_of(knobs: Knobs, found: Candidate, plan: MemoryPlan, plan_of: Planner) -> list[Change]:
    """Of a fitted config, what saves most memory first; then what saves most time."""
    changes = [_change(name, knobs, found, plan_of) for name in changed(knobs.own, found.settings)]
    return sorted(changes, key=lambda x: (-((x.needed or 0) - plan.needed), x.slower))


def changed(own: Settings, other: Settings) -> list[str]:
    """Names of settings that differ; those that go together once."""
    names = [name for name in PATHS if getattr(own, name) != getattr(other, name)]
    return list(dict.fromkeys(TOGETHER.get(name, name) for name in names))


def _change(name: str, knobs: Knobs, found: Candidate, plan_of: Planner) -> Change:
    names = [name, *(other for other, first in TOGETHER.items() if first == name)]
    without = found.settings._replace(**{x: getattr(knobs.own, x) for x in names})
    needed, slower = None, 1.0
    candidate = knobs.candidate(without)
    if candidate is not None:
        slower = found.cost.total / candidate.cost.total
        try:
            needed = plan_of(without.of(knobs.config)).needed
        except InputError:  # such as offloading without checkpointing
            needed = None
    why = WHY[name]
    if name == "reference" and found.settings.reference in ("8bit", "4bit"):
        why = ROUNDS
    was, now = (_shown(names, settings) for settings in (knobs.own, found.settings))
    return Change(PATHS[name], was, now, why, needed, slower)


def _shown(names: list[str], settings: Settings) -> str:
    """The value of a setting, with those that go with it where they are on."""
    first, *others = names
    value = getattr(settings, first)
    text = "default" if value is None else _literal(value)
    on = [PATHS[name].rpartition(".")[2] for name in others if getattr(settings, name)]
    return " with ".join([text, *on])


def _literal(value: Any) -> str:
    """As TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


HEADER = ("setting", "was", "now", "needs without it", "time of a step with it", "why")


def rows(changes: list[Change]) -> list[tuple[str, ...]]:
    """A line of a table for each."""
    return [
        (
            x.path, x.was, x.now, "-" if x.needed is None else f"{gib(x.needed)} GiB",
            f"{x.slower:.2f} x", x.why,
        )
        for x in changes
    ]  # fmt: skip


class Remedy(NamedTuple):
    """A single change of a config."""

    setting: str
    saved: int  # bytes
    slower: float

    def __str__(self) -> str:
        percent = round(100 * (self.slower - 1))
        cost = f"costs about {percent} % time" if percent > 0 else "costs no time"
        return f"set {self.setting}: saves {self.saved / GIB:.3g} GiB, {cost}"


def single_changes(knobs: Knobs, plan_of: Planner) -> list[Remedy]:
    """For each setting the fastest change that helps, fastest first."""
    own, before = knobs.candidate(knobs.own), plan_of(knobs.config).needed
    assert own is not None, "a config that runs can hold a completion"
    best: dict[str, Remedy] = {}
    for candidate in knobs.neighbours(knobs.own, rounded=ROUNDED[:1]):
        names = changed(knobs.own, candidate.settings)
        try:
            saved = before - plan_of(candidate.settings.of(knobs.config)).needed
        except InputError:
            continue
        if saved < WORTH * before:
            continue
        slower = candidate.cost.total / own.cost.total
        remedy = Remedy(_assignments(names, candidate.settings), saved, slower)
        if names[0] not in best or slower < best[names[0]].slower:
            best[names[0]] = remedy
    return sorted(best.values(), key=lambda x: (x.slower, -x.saved))


def _assignments(names: list[str], settings: Settings) -> str:
    both = [*names, *(x for x, first in TOGETHER.items() if first in names)]
    shown = [name for name in both if name in names or getattr(settings, name)]
    return ", ".join(f"{PATHS[name]} = {_literal(getattr(settings, name))}" for name in shown)
