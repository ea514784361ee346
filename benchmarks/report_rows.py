"""Write committed benchmark results into the documents that show them.

python benchmarks/report_rows.py

A section between `<!-- results:NAME -->` and `<!-- end of results -->` shows
benchmarks/results/cpu-2-cores/NAME.json as a table: medians with p20 and p80, peak memory beyond
the inputs, and both relative to the first correct implementation of ours in the case.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTION = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
NAMES = ("python", "torch", "transformers", "trl")


def render(name: str) -> str:
    """The table of one file of results, and what it was measured on."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    has_notes = any(row["note"] for row in rows)
    lines = ["| case | implementation | ms (p20 to p80) | time | peak MiB | memory |"]
    lines.append("|---|---|---|---|---|---|")
    if has_notes:
        lines = [lines[0] + " |", lines[1] + "---|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        members = [row for row in rows if row["case"] == case]
        base = next(row for row in members if row["implementation"].startswith("fastrl"))
        for row in members:
            line = _line(row, base, is_first=row is members[0])
            lines.append(f"{line} {row['note']} |" if has_notes else line)
    where = rows[0]["environment"]
    commits = dict.fromkeys(row["environment"]["commit"] for row in rows)
    versions = ", ".join(f"{name} {where[name]}" for name in NAMES if name in where)
    lines += [
        "",
        f"{where['cpu']}, {where['num_threads']} threads, {versions}; commit "
        f"{' and '.join(commits)}: `{where['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], base: dict[str, Any], *, is_first: bool) -> str:
    if not row["correct"]:
        return f"| {row['case'] if is_first else ''} | {row['implementation']} | incorrect | | | |"
    times = " to ".join(_significant(row[key]) for key in ("p20_ms", "p80_ms"))
    cells = [
        row["case"] if is_first else "",
        row["implementation"],
        f"{_significant(row['p50_ms'])} ({times})",
        _ratio(row["p50_ms"], base["p50_ms"]),
    ]
    if row["peak_bytes"] is None or base["peak_bytes"] is None:
        cells += ["", ""]
    else:
        cells.append(f"{row['peak_bytes'] / 2**20:.0f}")
        cells.append(_ratio(row["peak_bytes"], base["peak_bytes"]))
    return f"| {' | '.join(cells)} |"


def _ratio(value: float, base: float) -> str:
    """Two decimals, or two digits where these say nothing."""
    ratio = value / base
    return f"{ratio:.2f}x" if ratio >= 0.095 else f"{ratio:.2g}x"


def _significant(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def filled(text: str) -> str:
    """The document with its sections as the results are now."""
    return SECTION.sub(lambda found: found[1] + render(found[2]) + found[3], text)


def main() -> None:
    """Rewrite the sections of all documents."""
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
