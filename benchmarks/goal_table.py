"""Goals beside what the committed results say of them, as a table for each area."""

from __future__ import annotations

from pathlib import Path

from committed import COMPILED, CPU, RESULTS, devices, read
from goals import GOALS, Goal
from measures import Measured, shown
from quantities import GPU, QUANTITIES

HEADER = "| what | goal | measured | best peer | met |"


def measured(name: str, device: str, results: Path = RESULTS) -> Measured | None:
    """A quantity on one machine; None where its file is not committed."""
    quantity = QUANTITIES[name]
    folder = COMPILED if quantity.file == "kernel_resources" else device
    path = results / folder / f"{quantity.file}.json"
    if not path.exists():
        return None
    content = read(path)
    if isinstance(content, dict):
        content = content["rows"] if "rows" in content else content["runs"]
    return quantity.measure(content)


def is_met(goal: Goal, value: float) -> bool:
    """Whether the number is reached."""
    return value <= goal.most if goal.most is not None else value >= (goal.least or 0)


def line_of(goal: Goal, device: str | None, results: Path = RESULTS) -> str:
    """One row of the table; `device` is None where a goal is for a GPU and none was measured."""
    bound = f"at most {shown(goal.most, goal.unit)}" if goal.most is not None else ""
    if goal.least is not None:
        bound = f"at least {shown(goal.least, goal.unit)}"
    text = f"{goal.text} ({device or 'GPU'})" if goal.on_gpu else goal.text
    found, reason = None, ""
    if goal.quantity and device:
        try:
            found = measured(goal.quantity, device, results)
        except ValueError as error:
            if not goal.on_gpu:
                raise
            reason = f": {error}"  # of a suite that was stopped, or a case that failed
    if found is not None:
        met = "yes" if is_met(goal, found.value) else "**no**"
        cells = [shown(found.value, goal.unit), found.peer, met]
    elif goal.held_by:
        path, name = goal.held_by.split("::")
        cells = [f"held by `{name}` in `{path}`", "", "yes"]
    else:
        cells = [f"not measured{reason.split(';')[0]}", "", "unknown"]
    return f"| {' | '.join([text, bound, *cells])} |"


def table(results: Path = RESULTS) -> str:
    """All goals by area; those for a GPU once for each GPU that was measured."""
    gpus = [name for name in devices(results) if (results / name / f"{GPU}.json").exists()]
    lines = []
    for area in dict.fromkeys(goal.area for goal in GOALS):
        lines += [f"### {area}", "", HEADER, "|---|---|---|---|---|"]
        for goal in (goal for goal in GOALS if goal.area == area):
            on = (gpus or [None]) if goal.on_gpu else [CPU]
            lines += [line_of(goal, device, results) for device in on]
        lines.append("")
    return "\n".join(lines)


def counts(results: Path = RESULTS) -> tuple[int, int, int]:
    """How many goals are met, missed and not measured."""
    lines = [line for line in table(results).splitlines() if line.startswith("| ")]
    ends = [line.split(" | ")[-1].removesuffix(" |") for line in lines]
    return ends.count("yes"), ends.count("**no**"), ends.count("unknown")
