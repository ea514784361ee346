"""Whole GRPO steps of a policy of 0.5B to 1.5B parameters with random weights.

python benchmarks/bench_real_run.py [--size 0.5B|1.5B] [--json PATH] [--only TEXT ...] [--tiny]

Each case trains four steps in a process of its own, from rollouts by the native engine to new
weights, and times the last three by phase; beside the memory of a phase stands what `fastrl plan`
says of the same configuration. TRL's trainer takes part where it is installed: its updates, on
completions of the same shape. A case counts where the log-probabilities of a packed group are at
most twice as far from those in float32 as plain forward passes in the run's own precision are.

Operations of an update, which `% floor` and tflops are of: 3 (2 W (P + R) + 2 V D R +
2 L H K (P + R)^2) for each completion, W weights outside of embeddings and head; that is what
rows of their own need, whatever a trainer does. So 100 % is the rate of a large matrix product
with nothing shared, and sharing prompts may exceed it. The note has the operations really done.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from bench_shared_prefix import Case
from measure import quantiles
from real_run_cases import METHODS, SIZES, Measured, run_ours, run_trl
from rows import OURS, Row, environment, print_table
from suite import SuiteCase, make_parser, run_suite
from updates import save_model

TRL = "TRL GRPOTrainer"
FORMULAS = (
    "flops = 3 (2 W (P + R) + 2 V D R + 2 L H K (P + R)^2) for each completion; "
    "floor: as many at the rate of one large product"
)
LIMIT_SECONDS = 125.0  # four cases, and the model: within nine minutes
ROWS_AT_ONCE = 8  # of TRL's passes


def make_case(tiny: bool) -> Case:
    """Prompts, P, R, G."""
    return Case(2, 40, 12, 8) if tiny else Case(8, 512, 512, 8)


def rows_of(name: str, case: Case, size: str, found: Measured, device: str) -> list[Row]:
    """One for every phase."""
    rows = []
    for phase, seconds in found.seconds.items():
        times = quantiles([1000 * value for value in seconds])
        notes = [found.told]
        if phase in found.tokens:
            notes.insert(0, f"{found.tokens[phase] / times.p50 * 1000:.0f} tokens/s")
        if device == "cuda" and phase in found.plans:  # a CPU's resident memory has Python in it
            plan, peak = found.plans[phase], found.peaks[phase]
            notes.append(f"planned {plan / 2**30:.3g} GiB, {plan / peak:.2f} of the peak")
        flops = found.work.needed if phase == "train" else None
        if flops is not None:
            rate = found.work.done / times.p50 * 1000
            notes.append(
                f"{found.work.done / flops:.2f} of the operations done, at "
                f"{100 * rate / found.peak_flops:.1f}% of {found.peak_flops / 1e12:.3g} TFLOP/s"
            )
        floor = None if flops is None else 1000 * flops / found.peak_flops
        shape = str(case).removesuffix(" float32")
        rows.append(
            Row(
                case=f"{phase} {size} {shape}", implementation=name, correct=found.is_right,
                environment=environment(device), p20_ms=times.p20, p50_ms=times.p50,
                p80_ms=times.p80, peak_bytes=found.peaks.get(phase), floor_ms=floor,
                percent_of_floor=None if floor is None else 100 * floor / times.p50, flops=flops,
                tflops=None if flops is None else flops / times.p50 / 1e9,
                formulas="" if flops is None else FORMULAS, note="; ".join(notes),
            )
        )  # fmt: skip
    return rows


def measure(name: str, case: Case, size: str, directory: str, device: str) -> list[Row]:
    """Rows of one case, printed phase by phase."""
    if device == "cpu":
        torch.set_num_threads(1)
    if name == TRL:
        found = run_trl(case, Path(directory), device, ROWS_AT_ONCE)
    else:
        found = run_ours(case, name, Path(directory), device)
    full = name if name == TRL else f"{OURS} {name}"
    rows = rows_of(full, case, size, found, device)
    for row in rows:
        print_table([row])
    return rows


def main() -> int:
    """See the top of the file; 2 without a device."""
    parser = make_parser((__doc__ or "").splitlines()[0], seconds=530)
    parser.add_argument("--size", choices=[x for x in SIZES if x != "tiny"], default="0.5B")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print("bench_real_run needs a CUDA device, found none; --tiny tries it on the CPU")
        return 2
    device, size = ("cpu", "tiny") if args.tiny else ("cuda", args.size)
    absent = [] if find_spec("trl") and find_spec("datasets") else [f"{TRL}: trl is not installed"]
    names = [*METHODS, *([] if absent else [TRL])]
    case = make_case(args.tiny)
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, False, SIZES[size])
        cases = [
            SuiteCase(
                name, functools.partial(measure, name, case, size, directory, device),
                LIMIT_SECONDS, device,
            )
            for name in names
        ]  # fmt: skip
        return run_suite(cases, args, absent=absent)


if __name__ == "__main__":
    sys.exit(main())
