"""One case from beginning to end: check every implementation, measure memory, then time all.

An implementation that would take too much of the case's time is left out with a note, so that the
others are measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cases import Loaders, Prepared
from implementations import load
from measure import (
    MIN_ROUNDS,
    Peaks,
    ProcessLost,
    Step,
    Timing,
    copy_bandwidth,
    copy_step,
    in_fresh_process,
    peak_on_cuda,
    peaks_on_cpu,
    time_interleaved,
    time_limit,
)
from reference import TOLERANCES, Errors
from rows import OURS, Row, environment, print_table
from suite import SuiteCase, exit_status, make_parser, run_suite

__all__ = ["exit_status", "main", "measure_case"]

Prepare = Callable[..., Prepared]

COPY = "copy of memory"
SHARE = 4  # the part of a case's time that one implementation may take to be checked, or timed


class Verdict(NamedTuple):
    """What the first call of an implementation showed."""

    correct: bool
    errors: Errors
    failure: str = ""
    """Empty where the call returned."""
    gradient_bytes: int = 0
    """In new memory."""


def main(
    description: str, make_cases: Callable[[bool, str], list[Any]], prepare: Prepare,
    loaders: Loaders,
) -> int:  # fmt: skip
    """Command line shared by the benchmarks of kernels; see suite.run_suite for what it returns."""
    parser = make_parser(description)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--against", nargs="+", metavar="PEER", help="only these, beside ours")
    parser.add_argument(
        "--limit", type=float, default=1200.0, help="seconds until a case is killed"
    )
    args = parser.parse_args()
    if not device_is_there(args.device):
        return 2
    if args.against:
        for name in sorted(set(args.against) - set(loaders)):
            print(f"unknown peer {name!r}; there are {', '.join(loaders)}")
        kept = {name for name in loaders if name.startswith(OURS) or name in args.against}
        prepare = functools.partial(prepare_only, prepare, kept)
    cases = [
        kernel_case(case, prepare, seconds=5.0 if args.quick else 120.0, limit=args.limit)
        for case in make_cases(args.quick, args.device)
    ]
    return run_suite(cases, args, absent=load(loaders, args.device).absent)


def device_is_there(device: str) -> bool:
    """Prints a line where it is not."""
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA device, found none; leave it out to measure on the CPU")
        return False
    return True


def prepare_only(prepare: Prepare, kept: set[str], case: Any, only: str | None = None) -> Prepared:
    """The case with some of its implementations."""
    return prepare(case, only, kept=kept)


def kernel_case(
    case: Any, prepare: Prepare, *, seconds: float, limit: float, group: str = "",
    with_memory: bool = True,
) -> SuiteCase:  # fmt: skip
    """A case for a suite; the group tells cases of the same name apart."""
    name = f"{case} [{group}]" if group else str(case)
    measure = functools.partial(
        measure_case, name, case, prepare, seconds=seconds, limit_seconds=limit,
        with_memory=with_memory,
    )  # fmt: skip
    return SuiteCase(name, measure, limit, case.shape.device)


def measure_case(
    name: str, case: Any, prepare: Prepare, *, seconds: float, limit_seconds: float,
    with_memory: bool,
) -> list[Row]:  # fmt: skip
    """Rows of one case, printed as a table; `seconds` bounds the timing, not the rest.

    limit_seconds: after which the case is killed.
    """
    prepared = prepare(case)
    device, dtype = case.shape.device, case.shape.dtype
    verdicts = {
        key: judge(step, prepared, dtype, limit_seconds / SHARE)
        for key, step in prepared.steps.items()
    }
    steps = {key: step for key, step in prepared.steps.items() if not verdicts[key].failure}
    peaks: dict[str, Peaks | None] = {}
    for key, step in steps.items() if with_memory else ():
        if device == "cuda":
            count = peak_on_cuda(step, lambda: release(prepared))
            peaks[key] = Peaks(count, count)
            release(prepared)
        else:
            peaks[key] = peaks_in_fresh_process(prepare, case, key)
    ceilings = {prepared.floor_name: prepared.make_floor(), COPY: copy_step(device)}
    timings = time_interleaved(ceilings | steps, device=device, seconds=seconds)
    release(prepared)
    rows = make_rows(name, prepared, verdicts, peaks, timings, environment(device))
    print_table(rows)
    return rows


def judge(
    step: Step, prepared: Prepared, dtype: torch.dtype, limit_seconds: float | None = None
) -> Verdict:
    """Run once and compare with the reference; what an implementation raises is its result.

    limit_seconds: for the check, and for the fewest rounds that a timing has.
    """
    release(prepared)
    try:
        with time_limit(limit_seconds):
            started = time.perf_counter()
            outputs = step()
            if prepared.leaves[0].is_cuda:
                torch.cuda.synchronize()  # a fault of a kernel shows here, not at the next call
            is_slow = MIN_ROUNDS * (time.perf_counter() - started) > (limit_seconds or math.inf)
            if is_slow:  # or has compiled something, which the next call does not
                release(prepared)
                with time_limit(limit_seconds / MIN_ROUNDS):
                    outputs = step()
    except Exception as error:  # of other people's code; it is reported and counts as incorrect
        message = (str(error).splitlines() or [""])[0][:200]
        release(prepared)
        return Verdict(False, Errors(), failure=f"failed: {type(error).__name__}: {message}")
    errors = prepared.check(outputs)
    grads = [leaf.grad for leaf in prepared.leaves if leaf.grad is not None]
    old_memory = {tensor.data_ptr() for tensor in prepared.overwritable}
    num_bytes = sum(grad.nbytes for grad in grads if grad.data_ptr() not in old_memory)
    release(prepared)
    is_correct = errors.within(prepared.tolerances or TOLERANCES[dtype])
    return Verdict(is_correct, errors, gradient_bytes=num_bytes)


def release(prepared: Prepared) -> None:
    """Free the gradients that a step left behind, and what the allocator keeps of a failed one."""
    for leaf in prepared.leaves:
        leaf.grad = None
    if prepared.leaves[0].is_cuda:
        torch.cuda.empty_cache()


def peaks_in_fresh_process(prepare: Prepare, case: Any, name: str) -> Peaks | None:
    """Peak bytes on CPU; None where the process was killed, which a machine out of memory does."""
    try:
        return in_fresh_process(peaks_of, prepare, case, name)
    except ProcessLost as reason:
        print(f"{case}: no memory of {name}: {reason}")
        return None


def peaks_of(prepare: Prepare, case: Any, name: str) -> Peaks:
    """Peak bytes of one implementation, in this process."""
    prepared = prepare(case, only=name)
    return peaks_on_cpu(prepared.steps[name], lambda: release(prepared))


def make_rows(
    case: str, prepared: Prepared, verdicts: dict[str, Verdict], peaks: dict[str, Peaks | None],
    timings: dict[str, Timing], where: dict[str, str],
) -> list[Row]:  # fmt: skip
    """The floor first, then the implementations in their order."""
    floor_ms = timings[prepared.floor_name].p50
    bandwidth = copy_bandwidth(prepared.leaves[0].device.type, timings[COPY])
    rows = []
    for name in [prepared.floor_name, *verdicts]:
        verdict = verdicts.get(name, Verdict(True, Errors()))
        row = Row(
            case=case,
            implementation=name,
            correct=verdict.correct,
            environment=where,
            floor_ms=floor_ms,
            copy_gigabytes_per_second=bandwidth,
            flops=prepared.flops,
            num_bytes=prepared.num_bytes,
            formulas=prepared.formulas,
            loss_error=verdict.errors.loss,
            logp_error=verdict.errors.logps,
            hidden_grad_error=verdict.errors.hidden_grad,
            weight_grad_error=verdict.errors.weight_grad,
            note=verdict.failure,
        )
        row = with_memory_of(row, peaks.get(name), verdict.gradient_bytes)
        rows.append(with_times(row, timings[name], prepared) if name in timings else row)
    return rows


def with_memory_of(row: Row, peaks: Peaks | None, gradient_bytes: int) -> Row:
    """The row with its peaks, where there are any."""
    if peaks is None:
        return row
    return dataclasses.replace(
        row,
        peak_bytes=peaks.resident,
        tracked_peak_bytes=peaks.tracked,
        beyond_gradients_bytes=peaks.resident - gradient_bytes,
    )


def with_times(row: Row, timing: Timing, prepared: Prepared) -> Row:
    """The row with its times and what they amount to."""
    assert row.floor_ms is not None
    seconds = timing.p50 / 1000
    flops, num_bytes = prepared.flops, prepared.num_bytes
    return dataclasses.replace(
        row,
        p20_ms=timing.p20,
        p50_ms=timing.p50,
        p80_ms=timing.p80,
        percent_of_floor=100 * row.floor_ms / timing.p50,
        tflops=None if flops is None else flops / seconds / 1e12,
        gigabytes_per_second=None if num_bytes is None else num_bytes / seconds / 1e9,
    )
