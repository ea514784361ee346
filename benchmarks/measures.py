"""How a number that is spoken of comes from rows: parts, times and worst cases, with the best peer.

P prompt tokens, R completion tokens, G completions of a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from committed import Row, find, is_ours, is_peer, members


class Measured(NamedTuple):
    """A value, and what the best of the others has ("" where there is none)."""

    value: float
    peer: str = ""


MIB = 2**20
TIME, MEMORY = "p50_ms", "peak_bytes"


def shown(value: float, unit: str) -> str:
    """Ratios with two decimals or two digits, the rest with three digits."""
    if unit == "x":
        return f"{value:.2f}x" if value >= 0.095 else f"{value:.2g}x"
    digits = f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    return f"{digits} {unit}".strip() if unit != "%" else f"{digits}%"


def told(row: Row, column: str) -> str:
    """Name and value of a row."""
    value = row[column]
    known = shown(value / MIB, "MiB") if column.endswith("bytes") else shown(value, "ms")
    return f"{row['implementation']}, {known}"


def best(rows: list[Row], column: str) -> Row:
    """The row with the least."""
    known = [row for row in rows if row.get(column) is not None]
    if not known:
        raise ValueError(f"no row has {column}")
    return min(known, key=lambda row: float(row[column]))


def against(
    case: str, ours: str, other: str, column: str = TIME
) -> Callable[[list[Row]], Measured]:  # fmt: skip
    """Ours as a part of another implementation's in one case."""

    def measure(rows: list[Row]) -> Measured:
        mine, theirs = find(rows, case, ours), find(rows, case, other)
        peers = [row for row in members(rows, case) if row["case"] == case and is_peer(row)]
        peer = told(best(peers, column) if peers else theirs, column)
        return Measured(mine[column] / theirs[column], peer)

    return measure


def against_best(case: str, ours: str, peers: str, column: str = TIME) -> Callable[..., Measured]:
    """Ours as a part of the best of those whose names start with `peers`."""

    def measure(rows: list[Row]) -> Measured:
        others = [
            row for row in members(rows, case)
            if row["case"] == case and row["implementation"].startswith(peers)
        ]  # fmt: skip
        other = best(others, column)
        return Measured(find(rows, case, ours)[column] / other[column], told(other, column))

    return measure


def worst_against(
    start: str, ours: str, peers: str, column: str = TIME
) -> Callable[[list[Row]], Measured]:  # fmt: skip
    """The largest of these parts over all cases whose names start with `start`."""

    def measure(rows: list[Row]) -> Measured:
        cases = dict.fromkeys(row["case"] for row in members(rows, start))
        return max(against_best(case, ours, peers, column)(rows) for case in cases)

    return measure


def inverse(measure: Callable[[list[Row]], Measured]) -> Callable[[list[Row]], Measured]:
    """A part as a number of times."""

    def inverted(rows: list[Row]) -> Measured:
        found = measure(rows)
        return Measured(1 / found.value, found.peer)

    return inverted


def of_floor(*starts: str) -> Callable[[list[Row]], Measured]:
    """Our fastest implementation over what nothing can do without; the worst of several cases."""

    def measure_one(rows: list[Row], start: str) -> Measured:
        found = members(rows, start)
        mine = best([row for row in found if is_ours(row)], TIME)
        peers = [row for row in found if is_peer(row)]
        return Measured(
            mine[TIME] / mine["floor_ms"], told(best(peers, TIME), TIME) if peers else ""
        )

    return lambda rows: max(measure_one(rows, start) for start in starts)


def over_objectives(rows: list[Row]) -> Measured:
    """The slowest objective over plain PPO-clip."""
    plain = [row for row in rows if row["implementation"].endswith("clipped_ratio")]
    plain = [row for row in plain if row["implementation"].split()[-1] == "clipped_ratio"][:1]
    if not plain:
        raise ValueError("no row of 'clipped_ratio'")
    of_case = [row for row in members(rows, plain[0]["case"]) if row["case"] == plain[0]["case"]]
    return Measured(max(row[TIME] for row in of_case) / plain[0][TIME])


def selecting(rows: list[Row]) -> Measured:
    """The largest part of an update, in per cent, that decides what to keep."""
    parts = []
    for scores in ("scores from the sampler", "scores from the policy"):
        for row in members(rows, "update"):
            if row["implementation"] == f"fastrl selecting, {scores}":
                update = find(rows, row["case"], f"fastrl {scores}")
                parts.append(100 * row[TIME] / update[TIME])
    if not parts:
        raise ValueError("no row of 'fastrl selecting, ...'")
    return Measured(max(parts))


def kept_keys_and_values(rows: list[Row]) -> Measured:
    """Bytes of keys and values over those of `generate`, from the rows' notes."""
    case = "prompts=1 P=512 R=128 G=8 float32"

    def mebibytes(name: str) -> float:
        found = re.search(r"keys and values ([\d.]+) MiB", find(rows, case, name)["note"])
        if not found:
            raise ValueError(f"the note of {name} in {case!r} tells no keys and values")
        return float(found[1])

    theirs = mebibytes("transformers generate")
    told_of = f"transformers generate, {theirs:g} MiB"
    return Measured(mebibytes("fastrl native") / theirs, told_of)


def slowest_plan(rows: list[Row]) -> Measured:
    """Milliseconds of the slowest plan."""
    plans = [row[TIME] for row in rows if row["implementation"] == "fastrl, all"]
    if not plans:
        raise ValueError("no row of 'fastrl, all'")
    return Measured(max(plans))


def not_sharing(other: str) -> Callable[[list[Row]], Measured]:
    """How many times as fast as another the updates are that share nothing; the least."""

    def measure(rows: list[Row]) -> Measured:
        cases = {row["case"] for row in members(rows, "update") if " G=1 " in row["case"]}
        ours = "fastrl shared prefix"
        return min(inverse(against_best(case, ours, other))(rows) for case in sorted(cases))

    return measure


def bytes_a_parameter(rows: list[Row]) -> Measured:
    """Peak of a step with split weights, 8-bit moments and gradients freed in backward."""
    name = "adamw_8bit, split, in_backward two_phase"
    for row in rows:
        peak = re.search(r"peak ([\d.]+)$", row["note"])
        if row["implementation"] == name and row["correct"] and peak:
            return Measured(float(peak[1]))
    raise ValueError(f"no row of {name!r} tells its peak")


def plan_error(extreme: Callable[[list[float]], float]) -> Callable[[list[Row]], Measured]:
    """Predicted over measured peak, of the configuration where that is highest or lowest."""

    def measure(rows: list[Row]) -> Measured:
        return Measured(extreme([row["ratio"] for row in rows if row["phase"] == "peak"]))

    return measure


def longest_context(budget: int, name: str) -> Callable[[list[Row]], Measured]:
    """Tokens of the longest context in so many MiB; of one that has no end there, the longest that
    was tried.
    """

    def measure(rows: list[Row]) -> Measured:
        row = find(rows, f"frontier {budget} MiB, G=2, half prompt, float32", name)
        tokens = re.search(r"context (?:at least )?(\d+) tokens", row["note"])
        if not row["correct"] or not tokens:
            raise ValueError(f"{name!r} has no context in {budget} MiB: {row['note']}")
        return Measured(int(tokens[1]))

    return measure


def spilling(rows: list[Row]) -> Measured:
    """Compiled kernels that spill registers or do not fit into shared memory."""
    return Measured(sum(bool(row["spilled_bytes"]) or not row["fits"] for row in rows))


def per_pair(case: str, ours: str, other: str) -> Callable[[list[Row]], Measured]:
    """Speed by visible pair, ours over that of rows that repeat the prompt."""

    def measure(rows: list[Row]) -> Measured:
        P, R, G = (int(x) for x in re.findall(r"\b[PRG]=(\d+)", case))
        repeated = G * (P + R) * (P + R + 1) / 2
        shared = P * (P + 1) / 2 + G * (R * P + R * (R + 1) / 2)
        found = members(rows, case)
        mine = best([row for row in found if row["implementation"] == ours], TIME)
        theirs = best([row for row in found if row["implementation"] == other], TIME)
        return Measured((shared / mine[TIME]) / (repeated / theirs[TIME]), told(theirs, TIME))

    return measure


def part_of_best(
    start: str, ours: str, peers: tuple[str, ...], column: str = TIME
) -> Callable[[list[Row]], Measured]:  # fmt: skip
    """Our best as a part of the best of some peers, whichever processes they ran in."""

    def measure(rows: list[Row]) -> Measured:
        found = members(rows, start)
        mine = best([row for row in found if row["implementation"].startswith(ours)], column)
        theirs = best([row for row in found if row["implementation"].startswith(peers)], column)
        return Measured(mine[column] / theirs[column], told(theirs, column))

    return measure


def case_of_case(start: str, other: str, ours: str) -> Callable[[list[Row]], Measured]:
    """Our best time in one case as a part of that in another."""

    def time_of(rows: list[Row], name: str) -> float:
        mine = [row for row in members(rows, name) if row["implementation"].startswith(ours)]
        return float(best(mine, TIME)[TIME])

    return lambda rows: Measured(time_of(rows, start) / time_of(rows, other))


def most(start: str, ours: str, column: str, scale: float) -> Callable[[list[Row]], Measured]:
    """The largest value of ours in a column, in units of `scale`."""

    def measure(rows: list[Row]) -> Measured:
        found = [row for row in members(rows, start) if row["implementation"] == ours]
        return Measured(max(row[column] for row in found) / scale)

    return measure


def fastest(start: str) -> Callable[[list[Row]], Measured]:
    """Milliseconds of our fastest implementation, with those of the fastest peer."""

    def measure(rows: list[Row]) -> Measured:
        found = members(rows, start)
        mine = best([row for row in found if is_ours(row)], TIME)
        peers = [row for row in found if is_peer(row)]
        return Measured(mine[TIME], told(best(peers, TIME), TIME) if peers else "")

    return measure


def worst(*measures: Callable[[list[Row]], Measured]) -> Callable[[list[Row]], Measured]:
    """The largest of several."""
    return lambda rows: max(measure(rows) for measure in measures)


def gain(runs: list[Row]) -> Measured:
    """The least that a run of the demo adds to pass@1."""
    return Measured(min(run["pass_at_1_after"] - run["pass_at_1_before"] for run in runs))
