"""The fastest settings whose plan stays within a limit.

Candidates are tried from the fastest on, and the first that fits is the answer. What has not fit
rules others out before they are planned: those that would need no less in the phase that was too
large. A phase of sampling depends on what else is on the device and on the room for keys and
values, one of training on all but that room. More tokens in a pass, more workspace, activations
that are kept rather than computed again and larger chunks never need less, where all else is the
same and a step has one pass in both or several in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.memory.knobs import ROUNDED, Candidate, Knobs, Settings
from fastrl.memory.plan import MemoryPlan

SAMPLING = ("rollout", "evaluate")
FIRST = 3
"""Candidates that are tried before anything is known."""
Planner = Callable[[Config], MemoryPlan]


class Fit(NamedTuple):
    """What was found."""

    candidate: Candidate
    plan: MemoryPlan
    num_plans: int
    """How many were made on the way."""


class Needs(NamedTuple):
    """What a phase takes is a function of: alike in `kind`, it grows with each of `size`."""

    kind: tuple[Any, ...]
    size: tuple[float, ...]

    def includes(self, other: Needs) -> bool:
        """Whether it takes no less than the other."""
        pairs = zip(self.size, other.size, strict=True)
        return self.kind == other.kind and all(mine >= its for mine, its in pairs)


def needs_of(candidate: Candidate, *, samples: bool) -> Needs:
    """Of the phases that sample, or of those that train."""
    x = candidate.settings
    chunk = x.mlp_chunk_size or float("inf")
    if samples:
        cache = float("inf") if x.kv_cache_gib is None else x.kv_cache_gib
        return Needs((True, x.optimizer, x.reference), (cache, chunk))
    kept = 2 - x.checkpointing - x.offloading
    return Needs(
        (False, x.optimizer, x.reference, x.in_backward, candidate.is_single),
        (candidate.num_tokens, x.workspace_mb, kept, chunk),
    )


def fastest(knobs: Knobs, limit: int, plan_of: Planner) -> Fit | None:
    """The candidate that takes least time by the cost model; None where nothing fits.

    A reference that rounds is taken where nothing else fits, in 8 bits before 4.
    """
    failed: list[Needs] = []
    num_plans = 0
    tried: set[tuple[str, ...]] = set()
    for rounded in ((), ROUNDED[:1], ROUNDED):
        references = tuple(knobs.references(rounded=rounded))
        if references in tried:
            continue
        tried.add(references)
        candidates = knobs.candidates(rounded=rounded)
        # Where the least of a kind is too large, so is all of it; none has to be known where one of
        # the fastest fits.
        least = least_of_kinds(knobs, rounded=rounded)
        for order in (candidates[:FIRST], least, candidates):
            for candidate in order:
                if _is_ruled_out(candidate, failed):
                    continue
                plan = plan_of(candidate.settings.of(knobs.config))
                num_plans += 1
                if plan.needed > limit:
                    failed.append(needs_of(candidate, samples=plan.highest.name in SAMPLING))
                elif order is not least:
                    return Fit(candidate, plan, num_plans)
    return None


def _is_ruled_out(candidate: Candidate, failed: Collection[Needs]) -> bool:
    both = [needs_of(candidate, samples=samples) for samples in (True, False)]
    return any(needs.includes(other) for needs in both for other in failed)


def least_of_kinds(knobs: Knobs, *, rounded: Sequence[str] = ()) -> list[Candidate]:
    """Of the candidates whose training phases can be compared, that which takes least."""
    found: dict[Needs, Candidate] = {}
    for optimizer, reference, in_backward, is_least in itertools.product(
        knobs.optimizers(), knobs.references(rounded=rounded), knobs.in_backwards(), (True, False)
    ):
        base = leanest(knobs, is_least=is_least)
        candidate = knobs.candidate(
            base._replace(optimizer=optimizer, reference=reference, in_backward=in_backward)
        )
        repeats = in_backward == "two_phase" != knobs.own.in_backward
        if candidate is not None and (candidate.is_single or not repeats):
            needs = needs_of(candidate, samples=False)
            found[needs._replace(size=needs.size[:1])] = candidate
    return list(found.values())


def leanest(knobs: Knobs, *, is_least: bool) -> Settings:
    """All that saves memory in passes of one completion, or else of a whole step."""
    checkpointing, offloading = max(knobs.modes(), key=sum)
    cache = min(knobs.caches(), key=lambda gib: float("inf") if gib is None else gib)
    settings = knobs.own._replace(
        checkpointing=checkpointing, offloading=offloading, kv_cache_gib=cache
    )
    for _ in range(2):  # chunks depend on the budget, and the least budget on chunks
        budget = knobs.budgets(settings.of(knobs.config))[0 if is_least else -1]
        chunk = min(knobs.chunks(budget), key=lambda size: size or float("inf"))
        settings = settings._replace(max_tokens_per_pass=budget, mlp_chunk_size=chunk)
    workspaces = (settings._replace(workspace_mb=size) for size in sorted(knobs.workspaces()))
    return next((x for x in workspaces if knobs.candidate(x) is not None), settings)


def smallest(knobs: Knobs, plan_of: Planner) -> Fit:
    """The candidate that needs least: the least of every kind, and those next to it whose layers
    keep other activations, which in small models may take more memory for keeping less.
    """
    found = _least(least_of_kinds(knobs, rounded=ROUNDED), knobs, plan_of)
    own = found.candidate.settings
    near = [own._replace(checkpointing=x, offloading=y) for x, y in knobs.modes()]
    near += [own._replace(mlp_chunk_size=x) for x in knobs.chunks(own.max_tokens_per_pass)]
    others = (knobs.candidate(settings) for settings in dict.fromkeys(near) if settings != own)
    nearest = _least([found.candidate, *filter(None, others)], knobs, plan_of)
    return nearest._replace(num_plans=found.num_plans + nearest.num_plans)


def _least(candidates: list[Candidate], knobs: Knobs, plan_of: Planner) -> Fit:
    plans = [plan_of(x.settings.of(knobs.config)) for x in candidates]
    index = min(range(len(plans)), key=lambda i: (plans[i].needed, i))
    return Fit(candidates[index], plans[index], len(plans))


def knobs_for(config: Config, sizes: Any, device: str, plan_of: Planner) -> Knobs:
    """The knobs that the model has: those stay as they are with which it cannot be planned.

    Raises InputError where the config itself cannot be.
    """
    plan_of(config)
    knobs = Knobs(config, sizes, device)
    checkpointing = True if not knobs.own.offloading else knobs.own.checkpointing
    most = knobs.budgets(config)[-1]
    tries: dict[str, dict[str, Any]] = {
        "checkpointing": {"checkpointing": checkpointing},
        "mlp_chunk_size": {"mlp_chunk_size": knobs.chunks(most)[-1]},
        "reference": {"reference": knobs.references()[-1]},
        "kv_cache_gib": {"kv_cache_gib": knobs.caches()[-1]},
    }
    together = {name: value for changes in tries.values() for name, value in changes.items()}
    if _can_plan(knobs, together, plan_of):
        return knobs
    fixed = {name for name, changes in tries.items() if not _can_plan(knobs, changes, plan_of)}
    return Knobs(config, sizes, device, fixed=frozenset(fixed))


def _can_plan(knobs: Knobs, changes: dict[str, Any], plan_of: Planner) -> bool:
    """Whether the model can be planned with settings changed; not whether a pass is too small."""
    changed = knobs.own._replace(**changes)
    least = knobs.budgets(changed.of(knobs.config))[0]
    changed = changed._replace(max_tokens_per_pass=max(least, changed.max_tokens_per_pass))
    if changed == knobs.own or knobs.candidate(changed) is None:
        return True
    try:
        plan_of(changed.of(knobs.config))
    except InputError:
        return False
    return True
