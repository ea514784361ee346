"""The update of TRL's own trainers against the same trainers accelerated: time, memory, gradients.

python benchmarks/bench_drop_in.py [--quick] [--json PATH] [--only TEXT]

Both are TRL's GRPOTrainer (or DPOTrainer) on the same model (Qwen3, 25M parameters in its layers,
V = 32000, float32) with the same arguments and completions; one has gone through `accelerate_trl`.
An update is all between scored completions and new weights: TRL's shuffling, its loss, backward,
clipping, AdamW. In every case loss, norm and all gradients of both are compared first; without
agreement no ratio is printed. Updates are timed in turns. Memory is that of one update beyond
weights, gradients and optimizer states, in a process of its own; see measure.py.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from pathlib import Path

from bench_shared_prefix import Case
from compare import exit_status
from drop_in import Setting, Updates, errors, peak_of
from measure import in_fresh_process, quantiles
from rows import OURS, Row, environment, print_table, write_json

THEIRS = "TRL"
NAMES = {f"{OURS} in TRL": True, THEIRS: False}
TOLERANCE = 1e-5  # of loss, norm and gradients, relative to TRL's
NUM_ROUNDS = 5
GOAL = 0.5  # of TRL's time and of its memory, where completions share a prompt
GOAL_CASE = "dapo"


def settings(quick: bool) -> list[Setting]:
    """The first is that of the goals; the one before the last shares nothing."""
    prompt, completion, group = (64, 16, 4) if quick else (512, 128, 8)
    case = Case(1, prompt, completion, group)
    halves = Case(2, prompt, completion, group // 2)
    return [
        Setting(GOAL_CASE, case),
        Setting("dapo recomputing", case, {"gradient_checkpointing": True}),
        Setting("gspo", case, {"importance_sampling_level": "sequence", "loss_type": "grpo"}),
        Setting("dapo beta=0.04", case, {"beta": 0.04}),
        Setting("dapo in micro-batches of 2", halves, num_micro_batches=group // 2),
        Setting("dapo of distinct prompts", Case(group, prompt, completion, 1)),
        Setting("dpo", Case(group // 2, prompt, completion, 2), is_preference=True),
    ]


def measure(setting: Setting, *, quick: bool) -> list[Row]:
    """Compare, then time in turns, then memory in fresh processes."""
    both = {name: Updates(setting, is_ours=ours, quick=quick) for name, ours in NAMES.items()}
    of_loss, of_gradients = errors(*(updates.outcome() for updates in both.values()))
    seconds: dict[str, list[float]] = {name: [] for name in both}
    shuffle = random.Random(0).shuffle
    for updates in both.values():
        updates.update()  # the optimizer's states are there from the second one on
    for _ in range(NUM_ROUNDS):
        order = list(both)
        shuffle(order)
        for name in order:
            seconds[name].append(both[name].update())
    both.clear()
    gc.collect()  # trainers are full of cycles
    where, rows = environment("cpu"), []
    for name, is_ours in NAMES.items():
        times = quantiles([1000 * value for value in seconds[name]])
        rows.append(
            Row(
                case=f"update {setting}", implementation=name, environment=where,
                correct=max(of_loss, of_gradients) <= TOLERANCE, loss_error=of_loss,
                weight_grad_error=of_gradients,
                p20_ms=times.p20, p50_ms=times.p50, p80_ms=times.p80,
                peak_bytes=in_fresh_process(peak_of, setting, is_ours, quick),
            )
        )  # fmt: skip
    return rows


def print_ratios(setting: Setting, rows: list[Row]) -> None:
    """Our time and memory as parts of TRL's."""
    ours, theirs = rows
    goal = f" (goal {GOAL})" if setting.name == GOAL_CASE else ""
    for name, column in (("time", "p50_ms"), ("memory", "peak_bytes")):
        print(f"{name}: {getattr(ours, column) / getattr(theirs, column):.2f}x TRL's{goal}")
    sys.stdout.flush()


def main() -> int:
    """Prints a table for each case, and the ratios where both compute the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    rows: list[Row] = []
    for setting in settings(args.quick):
        if args.only in f"update {setting}":
            found = measure(setting, quick=args.quick)
            print_table(found)
            print(f"largest difference: of loss and norm {found[0].loss_error:.1e}, of gradients "
                  f"{found[0].weight_grad_error:.1e} (tolerance {TOLERANCE:g})")  # fmt: skip
            if all(row.correct for row in found):
                print_ratios(setting, found)
            rows += found
            write_json(args.json, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
