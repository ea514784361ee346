"""Predicted against measured: most memory of every phase, over configurations of all kinds.

python benchmarks/bench_memory_plan.py [--quick] [--json PATH] [--only TEXT]

Each configuration runs in a process of its own: two training steps and an evaluation of a real
trainer, every block of torch's allocator counted from before the model is built (memory_trace.py).
Beside it stands what `fastrl plan` says of the same configuration. The goal: the peak of a run is
met within 5%, and no peak is more than 2% higher than its prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import ProcessLost, in_fresh_process
from memory_cases import CASES, Case, config_of, measured
from rows import environment

from fastrl.memory import PHASES, plan_memory

OVER, UNDER = 0.05, 0.02
"""How far a prediction may be above what is measured, and below it, as fractions."""
LIMIT_SECONDS = 120.0
PEAK = "peak"
"""Stands for the phase that is highest."""


class Outcome(NamedTuple):
    """A phase of a configuration."""

    case: str
    phase: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def ratio(self) -> float:
        """Of predicted and measured."""
        return self.predicted_bytes / self.measured_bytes

    @property
    def is_met(self) -> bool:
        """Whether the prediction is as near as it should be."""
        return 1 - UNDER <= self.ratio <= 1 + OVER


def outcomes(case: Case) -> list[Outcome]:
    """Every phase of the case and its peak, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(case, Path(directory))
        plan = plan_memory(config)
        trace = measured(config)
    peaks = trace.peaks
    predicted = {phase.name: phase.total for phase in plan.phases}
    named = [name for name in PHASES if name in predicted and name in peaks]
    found = [Outcome(case.name, name, predicted[name], peaks[name]) for name in named]
    highest = max((peaks[name] for name in named), default=trace.highest)
    return [Outcome(case.name, PEAK, plan.peak, highest), *found]


def attempt(case: Case) -> list[Outcome] | str:
    """The same in a fresh process, or why there is none."""
    try:
        found: list[Outcome] = in_fresh_process(outcomes, case, limit_seconds=LIMIT_SECONDS)
    except ProcessLost as error:
        return str(error)
    except Exception as error:  # the suite goes on, and says what happened
        where = getattr(error, "__notes__", [""])[-1].strip().splitlines()[-5:]
        return "\n".join([f"{type(error).__name__}: {error}", *where])
    return found


def record(outcome: Outcome, where: dict[str, str]) -> dict[str, Any]:
    """As JSON."""
    return {**outcome._asdict(), "ratio": round(outcome.ratio, 4), "environment": where}


def line(found: Sequence[Outcome]) -> str:
    """The peak in MiB and all ratios."""
    peak, *phases = found
    ratios = " ".join(f"{x.phase} {x.ratio:.3f}" for x in phases)
    mark = " " if peak.is_met else "!"
    megabytes = f"{peak.predicted_bytes / 2**20:8.1f} {peak.measured_bytes / 2**20:8.1f}"
    return f"{mark} {peak.case:40} {megabytes} {peak.ratio:6.3f}  {ratios}"


def main() -> int:
    """Prints a line a case; returns 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few of the cases")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time")
    args = parser.parse_args()
    cases = [x for x in CASES if args.only in x.name and (x.is_quick or not args.quick)]
    where, rows, num_missed = environment("cpu"), [], 0
    print(f"  {'':40} {'plan MiB':>8} {'measured':>8} {'ratio':>6}")
    with ThreadPoolExecutor(args.processes) as pool:
        for case, found in zip(cases, pool.map(attempt, cases), strict=True):
            if isinstance(found, str):
                num_missed += 1
                print(f"! {case.name:40} {found}")
                continue
            num_missed += not found[0].is_met
            print(line(found), flush=True)
            rows += [record(outcome, where) for outcome in found]
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{len(cases)} configurations, {num_missed} not within -{UNDER:.0%} and +{OVER:.0%}")
    return int(num_missed > 0)


if __name__ == "__main__":
    sys.exit(main())
