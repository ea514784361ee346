"""The tables of benchmarks/headlines.py in Markdown: means over seeds, with lowest and highest.

What methods are compared at: the pass@1 that the first method of a claim has when three quarters of
its gain are made, seed by seed; and the most samples, or trained tokens, that every run has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from headline_cases import CLAIMS, Claim

SHARE = 0.75  # of the gain of the first method of a claim, which the others are to reach
MIB = 2**20
VERSIONS = ("python", "torch", "transformers")
Run = dict[str, Any]


def render(results: dict[str, Any]) -> str:
    """All claims that there are results for, with their tables, and what they were measured on."""
    parts = []
    for name, claim in CLAIMS.items():
        learning = [x for x in results["learning"] if x["learner"] in claim.learners]
        steps = [x for x in results["steps"] if x["setting"] in claim.settings]
        tables = []
        if {x["learner"] for x in learning} == set(claim.learners) and claim.learners:
            tables += [came_out(claim, learning), learning_table(claim, learning)]
        if {x["setting"] for x in steps} == set(claim.settings) and claim.settings:
            tables.append(steps_table(claim, steps))
        if name == "prefix_grouper" and results["prefix"]:
            tables.append(prefix_table(results["prefix"]))
        if tables:
            parts.append("\n\n".join([f"### {claim.title}", f"Claimed: {claim.said}.", *tables]))
    where = results["environment"]
    if where:
        versions = ", ".join(f"{name} {where[name]}" for name in VERSIONS if name in where)
        parts.append(
            f"{where['cpu']}, one core a run, float32, {versions}; commit {where['commit']}: "
            f"`{where['command']}`."
        )
    return "\n\n".join(parts) + "\n"


def came_out(claim: Claim, runs: Sequence[Run]) -> str:
    """What each method takes to the pass@1 of the first one, in words; with what came before."""
    by_seed = {(run["learner"], run["seed"]): run for run in runs}
    first, *others = claim.learners
    found = []
    for name in others:
        costs: dict[str, list[tuple[float, float]]] = {"samples": [], "seconds": []}
        seeds = [s for s in sorted({run["seed"] for run in runs})
                 if (name, s) in by_seed and (first, s) in by_seed]  # fmt: skip
        for seed in seeds:
            pair = by_seed[name, seed], by_seed[first, seed]
            target = target_of(pair[1])
            for key, of in costs.items():
                spent = [cost_of(run, target, key) for run in pair]
                if spent[0] is not None and spent[1] is not None:
                    of.append((spent[0] + pair[0]["before"][key], spent[1]))
        num_reached = len(costs["samples"])
        ratios = " and ".join(
            f"{sum(mine for mine, _ in of) / sum(theirs for _, theirs in of):.2f}x of the {key}"
            for key, of in costs.items()
            if of
        )
        said = f"with {ratios} where it does" if num_reached else ""
        longest = max(by_seed[name, seed]["points"][-1]["samples"] for seed in seeds) / 1e3
        found.append(
            f"{name} gets there in {num_reached} of {len(seeds)} runs of {longest:.0f}k samples "
            f"{said}".rstrip()
        )
    return (
        f"Came out, against {first}, at {SHARE:.0%} of what that gains, with what is sampled "
        f"before the first step: {'; '.join(found)}."
    )


def learning_table(claim: Claim, runs: Sequence[Run]) -> str:
    """A line for each method on the demo task."""
    by_seed = {(run["learner"], run["seed"]): run for run in runs}
    first = claim.learners[0]
    seeds = [s for s in sorted({run["seed"] for run in runs})
             if all((name, s) in by_seed for name in claim.learners)]  # fmt: skip
    targets = {seed: target_of(by_seed[first, seed]) for seed in seeds}
    most = {
        key: min(
            by_seed[name, seed]["points"][-1][key] for name in claim.learners for seed in seeds
        )
        for key in ("samples", "trained_tokens")
    }
    lines = [
        "| demo task | pass@1 before | "
        f"after {most['samples'] / 1e3:.0f}k samples | "
        f"after {most['trained_tokens'] / 1e3:.0f}k trained tokens | reached "
        f"{_spread(list(targets.values()), '.3f')} | samples to it | trained tokens to it "
        "| seconds to it | sampled before |",
        "|" + "---|" * 9,
    ]
    for name in claim.learners:
        of = [by_seed[name, seed] for seed in seeds]
        at = {key: [value_at(run, key, most[key]) for run in of] for key in most}
        reached = {
            key: [x for run in of if (x := cost_of(run, targets[run["seed"]], key)) is not None]
            for key in ("samples", "trained_tokens", "seconds")
        }
        cells = [
            f"{name}: {of[0]['said']}",
            _spread([run["points"][0]["pass_at_1"] for run in of], ".3f"),
            *(_spread(at[key], ".3f") for key in most),
            f"{len(reached['samples'])} of {len(of)}",
            *(_spread(reached[key], ".0f", 1e3, "k") for key in most),
            _spread(reached["seconds"], ".0f"),
            _before(of),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _before(runs: Sequence[Run]) -> str:
    """What was sampled before the first step."""
    if not any(run["before"]["samples"] for run in runs):
        return ""
    samples = [run["before"]["samples"] for run in runs]
    seconds = [run["before"]["seconds"] for run in runs]
    return f"{_spread(samples, '.0f', 1e3, 'k')} in {_spread(seconds, '.0f')} s"


def target_of(run: Run) -> float:
    """The pass@1 with SHARE of the run's gain; of a run that gains nothing, where it began."""
    first, last = run["points"][0]["pass_at_1"], run["points"][-1]["pass_at_1"]
    return float(first + SHARE * max(last - first, 0.0))


def value_at(run: Run, key: str, amount: float) -> float:
    """pass@1 when so much of `key` has been spent, between two evaluations in proportion."""
    points = run["points"]
    for before, after in pairwise(points):
        if before[key] <= amount <= after[key] and after[key] > before[key]:
            part = (amount - before[key]) / (after[key] - before[key])
            return float(before["pass_at_1"] + part * (after["pass_at_1"] - before["pass_at_1"]))
    return float(points[-1]["pass_at_1"])


def cost_of(run: Run, target: float, key: str) -> float | None:
    """What of `key` had been spent when pass@1 first was `target`; None where it never was."""
    points = run["points"]
    if points[0]["pass_at_1"] >= target:
        return 0.0
    for before, after in pairwise(points):
        if after["pass_at_1"] >= target:
            gained = after["pass_at_1"] - before["pass_at_1"]
            part = (target - before["pass_at_1"]) / gained
            return float(before[key] + part * (after[key] - before[key]))
    return None


def steps_table(claim: Claim, runs: Sequence[Run]) -> str:
    """A line for each setting of the larger model, and how it compares with the first."""
    of = {name: [run for run in runs if run["setting"] == name] for name in claim.settings}
    seconds = {name: [_per_completion(run) for run in found] for name, found in of.items()}
    steps = {name: [_mean(run["seconds"]) for run in found] for name, found in of.items()}
    peaks = {name: [run["peak_bytes"] for run in found] for name, found in of.items()}
    first = claim.settings[0]
    lines = [
        "| step of the 25M model | ms a step | | ms a completion | | peak MiB | |",
        "|" + "---|" * 7,
    ]
    for name, found in of.items():
        cells = [f"{name} ({found[0]['case']})"]
        for values, scale, form in (
            (steps, 1e-3, ".0f"), (seconds, 1e-3, ".0f"), (peaks, MIB, ".0f")
        ):  # fmt: skip
            ratio = _mean(values[name]) / _mean(values[first])
            cells += [_spread(values[name], form, scale), f"{ratio:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _per_completion(run: Run) -> float:
    return float(sum(run["seconds"]) / run["completions"])


def prefix_table(runs: Sequence[Run]) -> str:
    """A line for each shape and way; ratios are to our own."""
    lines = [
        "| forward and backward, 25M model | way | largest error of a float64 gradient | ms | "
        "| peak MiB | |",
        "|" + "---|" * 7,
    ]
    for shape in dict.fromkeys(run["shape"] for run in runs):
        of = [run["ways"] for run in runs if run["shape"] == shape]
        names = [name for name in of[0] if all(name in ways for ways in of)]
        for name in names:
            get = _getter(of)
            seconds, peaks = get(name, "seconds"), get(name, "peak_bytes")
            cells = [
                shape if name == names[0] else "",
                name,
                f"{max(get(name, 'error')):.0e}",
                _spread(seconds, ".0f", 1e-3),
                f"{_mean(seconds) / _mean(get(names[0], 'seconds')):.2f}x",
                _spread(peaks, ".0f", MIB),
                f"{_mean(peaks) / _mean(get(names[0], 'peak_bytes')):.2f}x",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _getter(ways: Sequence[Run]) -> Callable[[str, str], list[float]]:
    return lambda name, key: [found[name][key] for found in ways]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float], form: str, scale: float = 1.0, unit: str = "") -> str:
    """Mean (lowest to highest) in units of `scale`; a dash where there is none."""
    if not values:
        return "-"
    mean, low, high = (
        f"{value / scale:{form}}{unit}" for value in (_mean(values), min(values), max(values))
    )
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean
