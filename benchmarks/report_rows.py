"""Write committed benchmark results into the documents that show them.

python benchmarks/report_rows.py

A section between `<!-- results:NAME -->` and `<!-- end of results -->` shows
benchmarks/results/cpu-2-cores/NAME.json as a table: medians with p20 and p80, peak memory beyond
the inputs, and both relative to the first correct implementation of ours in the case. A number
after `<!-- measured:NAME -->` is that of quantities.py.
"""

from __future__ import annotations

import re
from typing import Any

import report_heads
from committed import CPU, OURS, RESULTS, ROOT, Row, read, rows_of
from goal_table import measured
from measures import shown
from quantities import QUANTITIES

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "kernels" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SECTION = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
NUMBER = re.compile(r"(<!-- measured:(\w+) -->)\d[\d.]*(?:e-?\d+)?(?:[x%]| (?:ms|MiB|bytes)\b)?")
HEADS = re.compile(r"(<!-- heads:begin -->\n).*?(<!-- heads:end -->)", re.DOTALL)
NAMES = ("python", "torch", "transformers", "trl")


def render(name: str) -> str:
    """The table of one file of results of the CPU, and what it was measured on."""
    content = read(RESULTS / CPU / f"{name}.json")
    rows = rows_of(content)
    if rows is None:
        raise ValueError(f"{name}.json holds no rows; a section of results shows rows")
    return f"{table(rows)}\n\n{where(rows, content)}\n"


def table(rows: list[Row]) -> str:
    """A line for each row, with a column for everything that any of them has."""
    has = {key: any(row.get(key) not in (None, "") for row in rows) for key in EXTRA}
    names = ["case", "implementation", "ms (p20 to p80)", "time", "peak MiB", "memory"]
    names += [title for key, title in EXTRA.items() if has[key]]
    lines = [f"| {' | '.join(names)} |".replace("|  |", "| |"), "|" + "---|" * len(names)]
    for case in dict.fromkeys(row["case"] for row in rows):
        members = [row for row in rows if row["case"] == case]
        ours = (row for row in members if row["implementation"].startswith(OURS))
        base = next((row for row in ours if row.get("correct") and row["p50_ms"]), None)
        if len(members) == 1:  # nothing to compare with
            base = None
        for row in members:
            extra = [_extra(row, key) for key in EXTRA if has[key]]
            cells = [row["case"] if row is members[0] else "", row["implementation"]]
            lines.append(f"| {' | '.join(cells + _cells(row, base) + extra)} |")
    return "\n".join(lines)


EXTRA = {"tracked_peak_bytes": "by the allocator", "percent_of_floor": "% of floor", "note": ""}
"""Columns that not every file has, with their titles."""


def where(rows: list[Row], content: Any = None) -> str:
    """Machine, versions, commits and commands."""
    place = rows[0].get("environment")
    if place is None:  # a file from before rows had one
        return f"{content['device']}, {content['threads']} threads, torch {content['torch']}: " + (
            f"`{content['command']}`."
        )
    commits = dict.fromkeys(row["environment"]["commit"] for row in rows)
    commands = dict.fromkeys(row["environment"]["command"] for row in rows)
    versions = ", ".join(f"{name} {place[name]}" for name in NAMES if name in place)
    driver = f", driver {place['driver']}" if "driver" in place else ""
    absent = f" Absent: {place['absent']}." if place.get("absent") else ""
    return (
        f"{place['device']}{driver}, {place['num_threads']} threads, {versions}; commit "
        f"{' and '.join(commits)}: {', '.join(f'`{command}`' for command in commands)}.{absent}"
    )


def _cells(row: Row, base: Row | None) -> list[str]:
    """Time and memory, each with its ratio to the base."""
    if row.get("correct") is False:
        return ["incorrect" if row["p50_ms"] else "", "", "", ""]
    cells = ["", "", "", ""]
    if row["p50_ms"] is not None:
        times = " to ".join(_significant(row[key]) for key in ("p20_ms", "p80_ms"))
        cells[0] = f"{_significant(row['p50_ms'])} ({times})"
        cells[1] = _ratio(row["p50_ms"], base and base["p50_ms"])
    if row["peak_bytes"] is not None:
        cells[2] = f"{row['peak_bytes'] / 2**20:.0f}"
        cells[3] = _ratio(row["peak_bytes"], base and base["peak_bytes"])
    return cells


def _extra(row: Row, key: str) -> str:
    """A cell of a column that not every file has."""
    value = row.get(key)
    if value is None or value == "":
        return ""
    if key == "tracked_peak_bytes":
        return f"{value / 2**20:.0f}"
    return f"{value:.0f}" if key == "percent_of_floor" else str(value)


def _ratio(value: float, base: float | None) -> str:
    """Two decimals, or two digits where these say nothing; nothing without a base."""
    return shown(value / base, "x") if base else ""


def _significant(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def number(name: str) -> str:
    """A quantity on the CPU, as documents quote it."""
    if name not in QUANTITIES:
        raise ValueError(f"no quantity {name!r}; there are {', '.join(QUANTITIES)}")
    found = measured(name, CPU)
    if found is None:
        raise ValueError(f"{name} is quoted, but {QUANTITIES[name].file}.json is not committed")
    return shown(found.value, QUANTITIES[name].unit)


def heads() -> str:
    """The table of the kernels' page."""
    return report_heads.render(read(RESULTS / CPU / "policy_loss.json"))


def filled(text: str) -> str:
    """The document with its sections and numbers as the results are now."""
    text = SECTION.sub(lambda found: found[1] + render(found[2]) + found[3], text)
    text = HEADS.sub(lambda found: found[1] + heads() + found[2], text)
    return NUMBER.sub(lambda found: found[1] + number(found[2]), text)


def main() -> None:
    """Rewrite the sections and numbers of all documents."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            path.write_text(filled(text), encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
