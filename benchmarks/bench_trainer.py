"""The update of a step, completions to new weights, against TRL's: time, memory, losses.

python benchmarks/bench_trainer.py [--quick] [--json PATH] [--only TEXT]

Both trainers get the same model (Qwen3, 25M parameters in its layers, V = 32000, float32), the same
completions, rewards and settings (AdamW, clip 0.2, token mean, no KL), in processes of their own
that take turns. Time is that of whole updates after the first. Memory, in processes of its own, is
what an update needs beyond weights and optimizer states: growth of the resident set, see
measure.py. First, both train
five steps of two iterations each on ragged completions: their losses must agree to 1e-5, or no
row is correct. TRL's own default recomputes activations; it is measured with and without, save
where it would not fit into 24 GB without.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench_shared_prefix import Case
from compare import exit_status
from measure import in_fresh_process, quantiles
from rows import OURS, Row, environment, print_table, write_json
from updates import Plan, Run, liger_absence, run_ours, run_trl

TOLERANCE = 1e-5  # of losses, relative to the largest
CURVE = Plan(Case(2, 96, 48, 4, is_ragged=True), num_steps=5, num_iterations=2, quick=False)


class Contender(NamedTuple):
    """A trainer with its settings."""

    name: str
    run: Callable[[Plan, dict[str, Any]], Run]
    settings: dict[str, Any]


CONTENDERS = (
    Contender(OURS, run_ours, {}),
    Contender(f"{OURS}, recomputing", run_ours, {"gradient_checkpointing": True}),
    Contender("TRL GRPOTrainer", run_trl, {"gradient_checkpointing": False}),
    Contender("TRL GRPOTrainer, recomputing", run_trl, {"gradient_checkpointing": True}),
)
GOALS = {512: (0.40, 0.45), 1024: (0.20, 0.25)}  # time and memory by P, of TRL's better row


def cases(quick: bool) -> list[tuple[Case, tuple[Contender, ...]]]:
    """With those that take part."""
    if quick:
        return [(Case(1, 64, 16, 4), CONTENDERS)]
    fitting = tuple(x for x in CONTENDERS if x.name != "TRL GRPOTrainer")
    return [(Case(1, 512, 128, 8), CONTENDERS), (Case(1, 1024, 64, 16), fitting)]


def largest_difference(quick: bool) -> float:
    """Of the losses of five steps of both, relative to TRL's: prints every loss."""
    plan = CURVE._replace(quick=quick)
    ours, theirs = (in_fresh_process(run, plan, {}).losses for run in (run_ours, run_trl))
    worst = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(ours, theirs, strict=True))
    print(f"losses of {OURS}:  {' '.join(f'{loss:+.6f}' for loss in ours)}")
    print(f"losses of TRL: {' '.join(f'{loss:+.6f}' for loss in theirs)}")
    print(f"they differ by {worst:.1e} of themselves at most (tolerance {TOLERANCE:g})")
    return worst


def measure(
    case: Case, contenders: tuple[Contender, ...], *, quick: bool, loss_error: float
) -> list[Row]:
    """Contenders in turns, each in a fresh process, with one update that is not timed."""
    plan = Plan(case, num_steps=4, num_iterations=1, quick=quick)
    thrifty = plan._replace(num_steps=2, for_memory=True)
    where, rows = environment("cpu"), []
    for name, run, settings in contenders:
        seconds = in_fresh_process(run, plan, settings).seconds
        times = quantiles([1000 * value for value in seconds])
        rows.append(
            Row(
                case=f"update {case}", implementation=name, correct=loss_error <= TOLERANCE,
                environment=where, loss_error=loss_error,
                p20_ms=times.p20, p50_ms=times.p50, p80_ms=times.p80,
                peak_bytes=in_fresh_process(run, thrifty, settings).peak_bytes,
            )
        )  # fmt: skip
    return rows


def print_goals(case: Case, rows: list[Row]) -> None:
    """Our time and memory as parts of TRL's, by its row that is better at each."""
    goals = GOALS.get(case.prompt_length)
    ours = [row for row in rows if row.implementation.startswith(OURS)]
    theirs = [row for row in rows if not row.implementation.startswith(OURS)]
    for name, key, goal in (("time", "p50_ms", 0), ("memory", "peak_bytes", 1)):
        best = min(getattr(row, key) for row in theirs)
        shown = ", ".join(f"{row.implementation} {getattr(row, key) / best:.2f}x" for row in ours)
        print(f"{name}: {shown} of TRL's best" + (f" (goal {goals[goal]:.2f})" if goals else ""))


def main() -> int:
    """Prints tables, goals and how far losses differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    loss_error, rows = largest_difference(args.quick), []
    print(liger_absence())
    for case, contenders in cases(args.quick):
        if args.only in f"update {case}":
            found = measure(case, contenders, quick=args.quick, loss_error=loss_error)
            print_table(found)
            if all(row.correct for row in found):
                print_goals(case, found)
            rows += found
            write_json(args.json, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
