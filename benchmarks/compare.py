"""One case from beginning to end: check every implementation, measure memory, then time all."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import Loaders, Prepared
from implementations import load
from measure import (
    Step,
    Timing,
    in_fresh_process,
    peak_on_cpu,
    peak_on_cuda,
    time_interleaved,
)
from reference import Errors
from rows import OURS, Row, environment, print_table, write_json

Prepare = Callable[..., Prepared]


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
    """Command line shared by the benchmarks; 1 where one of our implementations is not correct."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here, after every case")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--against", nargs="+", metavar="PEER", help="only these, beside ours")
    args = parser.parse_args()
    if args.against:
        unknown = set(args.against) - set(loaders)
        if unknown:
            parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(loaders)}")
        kept = {name for name in loaders if name.startswith(OURS) or name in args.against}
        prepare = functools.partial(prepare_only, prepare, kept)
    for line in load(loaders, args.device).absent:
        print(f"absent: {line}")
    rows: list[Row] = []
    for case in make_cases(args.quick, args.device):
        if args.only in str(case):
            seconds = 5.0 if args.quick else 120.0
            rows += measure_case(str(case), case, prepare, seconds=seconds, with_memory=True)
            write_json(args.json, rows)
    return exit_status(rows)


def prepare_only(prepare: Prepare, kept: set[str], case: Any, only: str | None = None) -> Prepared:
    """The case with some of its implementations."""
    return prepare(case, only, kept=kept)


def exit_status(rows: list[Row]) -> int:
    """1 where one of our implementations failed or is not correct, else 0."""
    return int(any(row.implementation.startswith(OURS) and not row.correct for row in rows))


def measure_case(
    name: str, case: Any, prepare: Prepare, *, seconds: float, with_memory: bool
) -> list[Row]:
    """Rows of one case, printed as a table; `seconds` bounds the timing, not the rest."""
    prepared = prepare(case)
    device, dtype = case.shape.device, case.shape.dtype
    verdicts = {key: judge(step, prepared, dtype) for key, step in prepared.steps.items()}
    steps = {key: step for key, step in prepared.steps.items() if not verdicts[key].failure}
    peaks: dict[str, int | None] = {}
    for key, step in steps.items() if with_memory else ():
        if device == "cuda":
            peaks[key] = peak_on_cuda(step, lambda: release(prepared))
            release(prepared)
        else:
            peaks[key] = peak_in_fresh_process(prepare, case, key)
    floor = {prepared.floor_name: prepared.make_floor()}
    timings = time_interleaved(floor | steps, device=device, seconds=seconds)
    release(prepared)
    rows = make_rows(name, prepared, verdicts, peaks, timings, environment(device))
    print_table(rows)
    return rows


def judge(step: Step, prepared: Prepared, dtype: torch.dtype) -> Verdict:
    """Run once and compare with the reference; what an implementation raises is its result."""
    release(prepared)
    try:
        outputs = step()
        if prepared.leaves[0].is_cuda:
            torch.cuda.synchronize()  # a fault of a kernel shows here, not at the next one's call
    except Exception as error:  # of other people's code; it is reported and counts as incorrect
        message = (str(error).splitlines() or [""])[0][:200]
        release(prepared)
        return Verdict(False, Errors(), failure=f"failed: {type(error).__name__}: {message}")
    errors = prepared.check(outputs)
    grads = [leaf.grad for leaf in prepared.leaves if leaf.grad is not None]
    old_memory = {tensor.data_ptr() for tensor in prepared.overwritable}
    num_bytes = sum(grad.nbytes for grad in grads if grad.data_ptr() not in old_memory)
    release(prepared)
    return Verdict(errors.within(dtype), errors, gradient_bytes=num_bytes)


def release(prepared: Prepared) -> None:
    """Free the gradients that a step left behind, and what the allocator keeps of a failed one."""
    for leaf in prepared.leaves:
        leaf.grad = None
    if prepared.leaves[0].is_cuda:
        torch.cuda.empty_cache()


def peak_in_fresh_process(prepare: Prepare, case: Any, name: str) -> int | None:
    """Peak bytes on CPU; None where the process was killed, which a machine out of memory does."""
    try:
        return in_fresh_process(peak_of, prepare, case, name)
    except BrokenProcessPool:
        print(f"{case}: the process that measured the memory of {name} died")
        return None


def peak_of(prepare: Prepare, case: Any, name: str) -> int:
    """Peak bytes of one implementation, in this process."""
    prepared = prepare(case, only=name)
    return peak_on_cpu(prepared.steps[name], lambda: release(prepared))


def make_rows(
    case: str, prepared: Prepared, verdicts: dict[str, Verdict], peaks: dict[str, int | None],
    timings: dict[str, Timing], where: dict[str, str],
) -> list[Row]:  # fmt: skip
    """The floor first, then the implementations in their order."""
    floor_ms = timings[prepared.floor_name].p50
    rows = []
    for name in [prepared.floor_name, *verdicts]:
        verdict = verdicts.get(name, Verdict(True, Errors()))
        row = Row(
            case=case,
            implementation=name,
            correct=verdict.correct,
            environment=where,
            floor_ms=floor_ms,
            loss_error=verdict.errors.loss,
            logp_error=verdict.errors.logps,
            hidden_grad_error=verdict.errors.hidden_grad,
            weight_grad_error=verdict.errors.weight_grad,
            note=verdict.failure,
        )
        row = with_memory_of(row, peaks.get(name), verdict.gradient_bytes)
        rows.append(with_times(row, timings[name], prepared) if name in timings else row)
    return rows


def with_memory_of(row: Row, peak: int | None, gradient_bytes: int) -> Row:
    """The row with its peak, where there is one."""
    if peak is None:
        return row
    beyond = peak - gradient_bytes
    return dataclasses.replace(row, peak_bytes=peak, beyond_gradients_bytes=beyond)


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
