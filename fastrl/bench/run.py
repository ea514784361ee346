"""`fastrl bench` from beginning to end: estimate, measure memory, check, time.

Everything is one run: the checks, the floor and the times are of the same process and minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastrl.bench.checking import Checker
from fastrl.bench.floor import Floor, flops_of, flops_per_second, products_of
from fastrl.bench.measuring import quantiles, time_in_turns, time_one
from fastrl.bench.models import load_model
from fastrl.bench.peaks import Job, peak_in_this_process, peaks_in_own_processes
from fastrl.bench.request import Request
from fastrl.bench.setup import Setup, set_up
from fastrl.bench.techniques import Technique
from fastrl.bench.updates import Updates
from fastrl.errors import InputError

MEMORY_SHARE = 0.5  # of the time, for the processes that measure memory
LEAST_SECONDS = 10.0  # for these, most of them to load libraries
NUM_CALLS = 2  # of every technique at least: its check and a round
SLACK = 1.5  # an update takes more than its matrix products


class Result(NamedTuple):
    """The rows are those of the setup, filled in."""

    setup: Setup
    floor_ms: float | None


def bench(request: Request) -> Result:
    """Measure; InputError before any compute for what cannot be measured."""
    setup = set_up(request)
    rate = flops_per_second(setup.blueprint, device=setup.device, dtype=setup.compute_dtype)
    _leave_out_slow(setup, rate)
    if setup.device.type == "cpu":
        _measure_memory(setup)
    policy = load_model(setup.request, setup.device)
    temperature = request.config.rollout.temperature
    updates = Updates(policy, setup.work, setup.layout, temperature)
    _check(setup, updates)
    return Result(setup, _measure_time(setup, updates))


def _check(setup: Setup, updates: Updates) -> None:
    """Every technique once, as long as there is time for a round of those that were."""
    checker, seconds = Checker(updates), 0.0
    for row in setup.left:
        if time.perf_counter() + seconds > setup.deadline and checker.first is not None:
            row.note = f"left out: no time left, {seconds:.0f} s for the others; raise --seconds"
            continue
        found = checker.check(row.technique)
        seconds += found.milliseconds / 1000
        row.is_correct, row.loss_error = found.is_correct, found.loss_error
        row.gradient_error = found.gradient_error
        if setup.device.type == "cuda":
            row.peak_bytes = peak_in_this_process(updates, row.technique)


def _leave_out_slow(setup: Setup, rate: float) -> None:
    """What would not end in time, by its matrix products and how fast this device is."""
    seconds = {
        row.technique.name: SLACK
        * flops_of(setup.blueprint, setup.passes[row.technique.name])
        / rate
        for row in setup.left
    }
    allowed = (1 - MEMORY_SHARE) * setup.request.seconds / NUM_CALLS / len(setup.left)
    for row in setup.left:
        expected = seconds[row.technique.name]
        if expected > allowed:
            row.note = f"left out: an update takes about {expected:.0f} s here; raise --seconds"
    if not setup.left:
        raise InputError(
            f"an update takes about {min(seconds.values()):.0f} s on this device and --seconds "
            f"{setup.request.seconds:g} leave {allowed:.0f} for one; lower --prompts or the "
            "lengths, or raise --seconds"
        )


def _measure_memory(setup: Setup) -> None:
    """On a CPU each technique in a process of its own, before this one has a model."""
    rows = setup.left
    left = setup.deadline - time.perf_counter() - (1 - MEMORY_SHARE) * setup.request.seconds
    if left < LEAST_SECONDS:
        setup.remarks.append(f"no memory measured: {left:.0f} s are too few; raise --seconds")
        return
    job = Job(
        setup.request, tuple(row.technique for row in rows), setup.layout,
        torch.get_num_threads(), time.monotonic() + left,
    )  # fmt: skip
    missing: dict[str, list[str]] = {}
    for row, peak in zip(rows, peaks_in_own_processes(job), strict=True):
        row.peak_bytes = peak.num_bytes
        if peak.why:
            missing.setdefault(peak.why, []).append(row.technique.name.strip())
    setup.remarks.extend(
        f"no memory of {', '.join(names)}: {why}" for why, names in missing.items()
    )


def _measure_time(setup: Setup, updates: Updates) -> float | None:
    """Rounds of all that is left and of the floor, whose median is returned."""
    turns = {row.technique.name: _turn(updates, row.technique) for row in setup.left}
    if setup.blueprint.has_experts:
        setup.remarks.append("no floor: the model routes tokens to experts")
    else:
        least = min(setup.passes.values(), key=lambda passes: flops_of(setup.blueprint, passes))
        floor = Floor(
            products_of(setup.blueprint, least), device=setup.device, dtype=setup.compute_dtype
        )
        time_one(floor, setup.device)
        turns["floor"] = lambda: time_one(floor, setup.device)
    times = time_in_turns(turns, deadline=setup.deadline)
    floor_ms = quantiles(times["floor"]).p50 if "floor" in times else None
    for row in setup.left:
        row.p20_ms, row.p50_ms, row.p80_ms = quantiles(times[row.technique.name])
        row.tokens_per_second = 1000 * setup.work.num_tokens / row.p50_ms
        if floor_ms is not None:
            row.percent_of_floor = 100 * floor_ms / row.p50_ms
    return floor_ms


def _turn(updates: Updates, technique: Technique) -> Callable[[], float]:
    """An update, timed without what switches the model over."""
    step = updates.step(technique)

    def turn() -> float:
        updates.switch(technique)
        milliseconds = time_one(step, updates.policy.device)
        updates.release()
        return milliseconds

    return turn
