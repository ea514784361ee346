"""What is committed under benchmarks/results: a folder for each machine, a file for each benchmark.

A file holds rows (benchmarks/rows.py), bare or under "rows", or else what its own page renders.
Nothing is imported but the standard library, so that pages can be made where nothing is installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU = "cpu-2-cores"
COMPILED = "aot"  # what compilation alone tells
OURS = "fastrl"  # the names of our implementations begin so
CEILINGS = ("bare ", "copy ")  # and those of what nothing can do without

Row = dict[str, Any]


def read(path: Path) -> Any:
    """The content of a file of results."""
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(content: Any) -> list[Row] | None:
    """The rows of a file; None where it has none."""
    rows = content.get("rows") if isinstance(content, dict) else content
    is_table = isinstance(rows, list) and rows and isinstance(rows[0], dict) and "case" in rows[0]
    return rows if is_table else None


def devices(results: Path = RESULTS) -> list[str]:
    """Folders of machines with a GPU."""
    folders = (path.name for path in sorted(results.iterdir()) if path.is_dir())
    return [name for name in folders if not name.startswith("cpu") and name != COMPILED]


def find(rows: Iterable[Row], case: str, implementation: str) -> Row:
    """The row of one implementation, which must be correct and timed."""
    rows = list(rows)
    for row in rows:
        if row["case"] == case and row["implementation"] == implementation:
            if is_measured(row):
                return row
            raise ValueError(f"{implementation} in {case!r} is not correct or was not measured")
    known = ", ".join(dict.fromkeys(f"{row['case']!r}" for row in rows))
    raise ValueError(f"no row of {implementation!r} in {case!r}; cases are {known}")


def members(rows: Iterable[Row], start: str) -> list[Row]:
    """The correct rows of all cases whose names start so; an error where there is none."""
    rows = list(rows)
    found = [row for row in rows if row["case"].startswith(start) and is_measured(row)]
    if not found:
        known = ", ".join(dict.fromkeys(f"{row['case']!r}" for row in rows))
        raise ValueError(f"no correct row of a case {start!r}...; cases are {known}")
    return found


def is_measured(row: Row) -> bool:
    """Whether a row has a time that may be compared; files from before the check have None."""
    return row.get("correct") is not False and row.get("p50_ms") is not None


def is_ours(row: Row) -> bool:
    """Whether the implementation is one of ours."""
    return bool(row["implementation"].startswith(OURS))


def is_peer(row: Row) -> bool:
    """Whether it is somebody else's, and no ceiling."""
    return not is_ours(row) and not row["implementation"].startswith(CEILINGS)
