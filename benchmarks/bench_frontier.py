"""The longest context whose update fits into a budget of memory: our trainer's and TRL's.

python benchmarks/bench_frontier.py [--quick] [--json PATH] [--budgets MIB ...] [--minutes M]

Both get the same model (Qwen3, 16 layers of D = 256, V = 32000, float32), one prompt with G = 2
completions, half of the context each, and train as few completions at a time as they can: TRL one
a pass with gradient accumulation, ours as many as `max_tokens_per_pass` of one completion with its
prompt holds. The budget is for what an update takes beyond weights and optimizer states, gradients
included, as in bench_trainer.py. Contexts are multiples of 64 up to MAX_CONTEXT; each is tried in
a fresh process, the next one where the line through the nearest two crosses the budget, until the
longest that fits is known to within TOLERANCE of the budget. When the minutes are over, what is
known is reported as a lower bound. Times are of these runs, and measuring memory takes some.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench_shared_prefix import Case, Sizes
from compare import exit_status
from measure import in_fresh_process
from rows import MIB, OURS, Row, environment, write_json
from updates import Plan, Run, liger_absence, run_ours, run_trl

SIZES = Sizes(256, 16, 768, 32000)
NUM_GENERATIONS, STEP = 2, 64
SHORTEST, MAX_CONTEXT, MAX_TRIES = 512, 8192, 5
TOLERANCE = 0.05  # of the budget, that the longest context may leave unused
BUDGETS = (256, 512, 1024)


class Tried(NamedTuple):
    """An update at a context."""

    peak_bytes: int
    milliseconds: float


class Contender(NamedTuple):
    """A trainer with its settings."""

    name: str
    run: Callable[[Plan, dict[str, Any]], Run]
    settings: dict[str, Any]


CONTENDERS = (
    Contender(f"{OURS}", run_ours, {}),
    Contender("TRL GRPOTrainer", run_trl, {"gradient_checkpointing": False}),
    Contender(f"{OURS}, recomputing", run_ours, {"gradient_checkpointing": True}),
    Contender("TRL GRPOTrainer, recomputing", run_trl, {"gradient_checkpointing": True}),
)


class Frontier:
    """What one contender has been tried at, shared by all budgets."""

    def __init__(self, contender: Contender, quick: bool, deadline: float) -> None:
        self.contender = contender
        self.quick = quick
        self.deadline = deadline
        self.tried: dict[int, Tried] = {}

    def try_at(self, context: int) -> Tried:
        """The second update of a fresh process, unless that is known."""
        if context not in self.tried:
            case = Case(1, context // 2, context - context // 2, NUM_GENERATIONS)
            sizes = None if self.quick else SIZES
            plan = Plan(case, num_steps=2, num_iterations=1, quick=self.quick, for_memory=True,
                        sizes=sizes, one_by_one=True)  # fmt: skip
            run = in_fresh_process(self.contender.run, plan, self.contender.settings)
            self.tried[context] = Tried(run.peak_bytes, 1000 * run.seconds[0])
            shown = f"{run.peak_bytes / MIB:.0f} MiB, {run.seconds[0]:.1f} s"
            print(f"{self.contender.name}, context {context}: {shown}", flush=True)
        return self.tried[context]

    def longest(self, budget: int) -> tuple[int | None, bool]:
        """The longest context that fits, and whether the search has come to its end."""
        for context in (SHORTEST, 2 * SHORTEST):
            self.try_at(context)
        for _ in range(MAX_TRIES):
            best = max((c for c, t in self.tried.items() if t.peak_bytes <= budget), default=None)
            wanted = next_context({c: t.peak_bytes for c, t in self.tried.items()}, budget)
            is_close = best is not None and (
                self.tried[best].peak_bytes >= (1 - TOLERANCE) * budget or best == MAX_CONTEXT
            )
            if wanted is None or is_close:
                return best, True
            if time.monotonic() > self.deadline:
                return best, False
            self.try_at(wanted)
        return max((c for c, t in self.tried.items() if t.peak_bytes <= budget), default=None), True


def next_context(peaks: dict[int, int], budget: int) -> int | None:
    """Where the line through the two contexts nearest to the budget crosses it; None if known."""
    below = max((c for c, peak in peaks.items() if peak <= budget), default=0)
    above = min((c for c, peak in peaks.items() if peak > budget and c > below), default=None)
    known = sorted(peaks)
    if below and above:
        low, high = below, above
    elif below:
        low, high = known[-2], known[-1]
    else:
        low, high = known[0], known[1]
    slope = (peaks[high] - peaks[low]) / (high - low)
    if slope <= 0:  # memory does not grow here: look twice as far
        wanted = 2 * high
    else:
        wanted = round((low + (0.99 * budget - peaks[low]) / slope) // STEP) * STEP
    wanted = min(wanted, MAX_CONTEXT)
    if above:
        wanted = min(max(wanted, below + STEP), above - STEP)
    return wanted if wanted > below and wanted >= STEP and wanted not in peaks else None


def row_of(frontier: Frontier, budget: int, where: dict[str, str]) -> Row:
    """The longest context of a contender, in the note; its peak and time."""
    context, is_known = frontier.longest(budget)
    case = f"frontier {budget // MIB} MiB, G={NUM_GENERATIONS}, half prompt, float32"
    name = frontier.contender.name
    if context is None:
        least = min(tried.peak_bytes for tried in frontier.tried.values()) / MIB
        note = f"no context fits: {min(frontier.tried)} tokens take {least:.0f} MiB"
        return Row(case=case, implementation=name, correct=True, environment=where, note=note)
    tried = frontier.tried[context]
    bound = "" if is_known and context < MAX_CONTEXT else "at least "
    return Row(
        case=case, implementation=name, correct=True, environment=where,
        p20_ms=tried.milliseconds, p50_ms=tried.milliseconds, p80_ms=tried.milliseconds,
        peak_bytes=tried.peak_bytes, note=f"context {bound}{context} tokens",
    )  # fmt: skip


def main() -> int:
    """Prints what fits, budget by budget."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--budgets", type=int, nargs="+", default=None, help="MiB, smallest first")
    parser.add_argument("--minutes", type=float, default=12.0, help="no new run after so many")
    args = parser.parse_args()
    budgets = sorted(args.budgets or ((40, 80) if args.quick else BUDGETS))
    deadline = time.monotonic() + 60 * args.minutes
    print(liger_absence())
    frontiers = [Frontier(contender, args.quick, deadline) for contender in CONTENDERS]
    where, rows = environment("cpu"), []
    for budget in budgets:
        for frontier in frontiers:
            row = row_of(frontier, budget * MIB, where)
            print(f"{row.case}: {row.implementation}: {row.note}", flush=True)
            rows.append(row)
            write_json(args.json, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
