"""Cases one after the other, each in a process of its own with a time limit.

What is measured is written after every case, so that a run that is stopped keeps it. A case that
runs over its limit is killed with all it started, one whose process dies or that needs a device
which is not there is noted; the next one follows.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import ProcessLost, in_fresh_process
from rows import OURS, Row, environment, write_csv, write_json

LEAST_SECONDS = 10.0  # a case with less is not worth starting: imports take that


@dataclass(frozen=True)
class SuiteCase:
    """What is measured, and after how many seconds its process is killed."""

    name: str
    measure: Callable[[], list[Row]]
    """Prints its rows and returns them; picklable."""
    limit_seconds: float
    device: str = "cpu"

    def __str__(self) -> str:
        """The name that --only looks in."""
        return self.name


def make_parser(description: str, *, seconds: float | None = None) -> argparse.ArgumentParser:
    """The command line that all have in common; `seconds` bounds all cases together."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows here, after every case")
    parser.add_argument("--csv", type=Path, help="and here as a table")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name contains one"
    )
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="for all cases together; no limit if not set"
    )
    return parser


def run_suite(
    cases: Sequence[SuiteCase], args: argparse.Namespace, *, absent: Sequence[str] = ()
) -> int:
    """Print and write the rows of the chosen cases.

    absent: a line for each peer that is missing. Returns 2 where no case has the name, 1 where one
    of our implementations is not correct, else 0.
    """
    for line in absent:
        print(f"absent: {line}")
    chosen = choose(cases, args.only)
    if not chosen:
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the case's process ends too
    rows: list[Row] = []
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    for case in chosen:
        left = case.limit_seconds if deadline is None else deadline - time.monotonic()
        found = run_case(case, min(case.limit_seconds, left))
        rows += [with_absent(row, absent) for row in found]
        write_json(args.json, rows)
        write_csv(args.csv, rows)
    return exit_status(rows)


def choose(cases: Sequence[SuiteCase], texts: Sequence[str]) -> list[SuiteCase]:
    """Cases whose name contains one of the texts; a line for each text that is in none."""
    for text in texts:
        if not any(text in case.name for case in cases):
            print(
                f"unknown case {text!r}; there are {', '.join(repr(case.name) for case in cases)}"
            )
    return [case for case in cases if any(text in case.name for text in texts)]


def run_case(case: SuiteCase, limit_seconds: float) -> list[Row]:
    """Rows of one case, or one row that says why there are none."""
    if limit_seconds < LEAST_SECONDS:
        return [failure(case, "skipped: the suite's time was used up")]
    if case.device == "cuda" and not torch.cuda.is_available():
        return [failure(case, "skipped: needs a CUDA device, found none")]
    try:
        return in_fresh_process(measured, case, limit_seconds=limit_seconds)
    except ProcessLost as reason:
        return [failure(case, str(reason))]
    except (
        Exception
    ) as error:  # of a case that cannot be set up here; the others are still worth it
        message = (str(error).splitlines() or [""])[0][:200]
        return [failure(case, f"failed: {type(error).__name__}: {message}")]


def measured(case: SuiteCase) -> list[Row]:
    """Rows of one case in this process."""
    rows = case.measure()
    sys.stdout.flush()
    return rows


def failure(case: SuiteCase, reason: str) -> Row:
    """A row for a case without results."""
    print(f"\n{case}\n{reason}", flush=True)
    has_device = case.device == "cpu" or torch.cuda.is_available()
    return Row(
        case=case.name,
        implementation="all",
        correct=False,
        environment=environment(case.device if has_device else "cpu"),
        note=reason,
    )


def with_absent(row: Row, absent: Sequence[str]) -> Row:
    """The row that says which peers were missing."""
    if not absent:
        return row
    return dataclasses.replace(row, environment=row.environment | {"absent": "; ".join(absent)})


def exit_status(rows: Sequence[Row]) -> int:
    """1 where one of our implementations failed or is not correct, else 0."""
    return int(any(row.implementation.startswith(OURS) and not row.correct for row in rows))
