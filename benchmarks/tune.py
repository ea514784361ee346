"""Try launch settings around today's, one group of them after the other; propose what is faster.

python benchmarks/tune.py [--json PATH] [--only TEXT ...] [--seconds 500] [--after SUITE.json]

Each task of tune_cases.py has a process of its own. A candidate is compiled, left out where it does
not fit or spills much, compared with float64, and timed in turns with today's settings; the best
few are timed again, beside today's settings twice, whose difference is noise. A setting is proposed
where the slow runs of the best are faster than the fast ones of both. --after takes the tasks in
the order of their distance from the floor in the rows of a suite. --tiny tries all of it on the
CPU, under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compare import Verdict, judge, release
from measure import Timing, copy_bandwidth, copy_step, time_interleaved
from rows import OURS, Row, environment, print_table
from suite import SuiteCase, make_parser, run_suite
from tune_cases import Task, tasks
from tune_settings import Settings, current, interpreted, overridden

TODAY, AGAIN, COPY = f"{OURS}, today", f"{OURS}, today again", "copy of memory"
NUM_FINALISTS = 4
SHARE_FOR_CHECKS, SHARE_FOR_TIMES = 0.6, 0.2  # of a task's time; the finalists have the rest
MOST_SPILLS = 64  # numbers of 4 bytes for a thread: outside of loops so many cost little
CHECK_SECONDS = 20.0  # of one candidate: compiling and two calls


@contextmanager
def counted_spills() -> Iterator[list[int]]:
    """Of every kernel launched within: numbers a thread keeps in memory for want of registers."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    spills: list[int] = []
    originals = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def counting(original: Any) -> Any:
        def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            compiled = original(kernel, *args, **kwargs)
            spills.append(getattr(compiled, "n_spills", 0) or 0)
            return compiled

        return run

    try:
        for kind, original in originals.items():
            kind.run = counting(original)
        yield spills
    finally:
        for kind, original in originals.items():
            kind.run = original


def measure_task(task: Task, seconds: float) -> list[Row]:
    """Rows of today's settings and of every candidate, printed with what they propose."""
    if task.case.shape.device == "cpu":
        with interpreted():
            return measured(task, seconds)
    return measured(task, seconds)


def measured(task: Task, seconds: float) -> list[Row]:
    """The same, where "auto" is the kernels."""
    began = time.monotonic()
    prepared = task.prepare(task.case, only=task.implementation)
    step, dtype = prepared.steps[task.implementation], task.case.shape.dtype
    candidates: dict[str, Settings] = {TODAY: {}, **task.candidates()}
    verdicts: dict[str, Verdict] = {}
    for label, settings in candidates.items():
        if verdicts and time.monotonic() - began > SHARE_FOR_CHECKS * seconds:
            break
        with overridden(settings), counted_spills() as spills:
            verdict = judge(step, prepared, dtype, CHECK_SECONDS)
        if not verdict.failure and not spills:
            verdict = verdict._replace(correct=False, failure="launches no kernel of ours")
        if max(spills, default=0) > MOST_SPILLS and label != TODAY:
            told = f"spills {4 * max(spills)} bytes a thread"
            verdict = verdict._replace(correct=False, failure=told)
        verdicts[label] = verdict
        if "CUDA error" in verdict.failure:  # the device is lost to this process
            break

    def steps_of(labels: Sequence[str]) -> dict[str, Any]:
        def with_settings(label: str) -> Any:
            with overridden(candidates[label]):
                return step()

        return {label: functools.partial(with_settings, label) for label in labels}

    device = task.case.shape.device
    right = [label for label in verdicts if verdicts[label].correct]
    ceilings = {prepared.floor_name: prepared.make_floor(), COPY: copy_step(device)}
    timings: dict[str, Timing] = {}
    if TODAY in right:
        timings = time_interleaved(
            ceilings | steps_of(right), device=device, seconds=SHARE_FOR_TIMES * seconds
        )
        best = sorted(right, key=lambda label: timings[label].p50)[:NUM_FINALISTS]
        finalists = ceilings | steps_of(dict.fromkeys([TODAY, *best]))
        finalists[AGAIN] = finalists[TODAY]
        timings |= time_interleaved(
            finalists, device=device, seconds=SHARE_FOR_TIMES * seconds, seed=1
        )
        verdicts[AGAIN] = verdicts[TODAY]
    release(prepared)
    left_out = len(candidates) - len(verdicts) + (AGAIN in verdicts)
    rows = [
        row_of(task, label, verdict, timings, prepared) for label, verdict in verdicts.items()
    ]  # fmt: skip
    print_table(rows)
    if left_out:
        print(f"{left_out} candidates left out for want of time")
    print(proposal(candidates, timings))
    return rows


def row_of(
    task: Task, label: str, verdict: Verdict, timings: dict[str, Timing], prepared: Any
) -> Row:
    """What was found of one candidate."""
    device = task.case.shape.device
    row = Row(
        case=task.name, implementation=label, correct=verdict.correct,
        environment=environment(device), flops=prepared.flops, num_bytes=prepared.num_bytes,
        formulas=prepared.formulas, loss_error=verdict.errors.loss,
        logp_error=verdict.errors.logps, hidden_grad_error=verdict.errors.hidden_grad,
        weight_grad_error=verdict.errors.weight_grad, note=verdict.failure,
    )  # fmt: skip
    if label not in timings or not verdict.correct:
        wrong = "" if verdict.correct else "incorrect"
        return dataclasses.replace(row, note=row.note or wrong or "not timed")
    timing, floor = timings[label], timings[prepared.floor_name].p50
    return dataclasses.replace(
        row, p20_ms=timing.p20, p50_ms=timing.p50, p80_ms=timing.p80, floor_ms=floor,
        percent_of_floor=100 * floor / timing.p50,
        copy_gigabytes_per_second=copy_bandwidth(device, timings[COPY]),
        tflops=None if prepared.flops is None else prepared.flops / timing.p50 / 1e9,
        gigabytes_per_second=(
            None if prepared.num_bytes is None else prepared.num_bytes / timing.p50 / 1e6
        ),
    )  # fmt: skip


def proposal(candidates: dict[str, Settings], timings: dict[str, Timing]) -> str:
    """Which settings to change to what; none where the difference may be noise."""
    if AGAIN not in timings:
        return "no proposal: today's settings were not timed"
    others = [label for label in timings if candidates.get(label)]
    fast_today = min(timings[TODAY].p20, timings[AGAIN].p20)
    today = timings[TODAY].p50
    if not others:
        return "no proposal: no candidate is right"
    best = min(others, key=lambda label: timings[label].p50)
    found = timings[best]
    change = f"{today:.3g} -> {found.p50:.3g} ms ({100 * (found.p50 / today - 1):+.1f}%)"
    if found.p80 >= fast_today:
        return f"no proposal: the best, {best}, is within the noise: {change}"
    lines = [f"proposal: {best}: {change}, p80 {found.p80:.3g} below today's p20 {fast_today:.3g}"]
    for path, value in candidates[best].items():
        lines.append(f"  {path} = {value!r}  # today {current(path)!r}")
    return "\n".join(lines)


def by_distance(found: Sequence[Task], path: Path | None) -> list[Task]:
    """Furthest from the floor first, by a suite's rows; tasks of no row stay where they are."""
    if path is None:
        return list(found)
    percents: dict[str, float] = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        if row["correct"] and row["percent_of_floor"] is not None:
            key = f"{row['case'].split(' [')[0]}|{row['implementation']}"
            percents[key] = row["percent_of_floor"]
    return sorted(found, key=lambda task: percents.get(f"{task.case}|{task.implementation}", 50.0))


def main() -> int:
    """See the top of the file; 2 without a device."""
    parser = make_parser((__doc__ or "").splitlines()[0], seconds=500)
    parser.add_argument("--task-seconds", type=float, default=50.0, help="of one task at most")
    parser.add_argument("--after", type=Path, help="rows of a suite, for the order")
    parser.add_argument("--tiny", action="store_true", help="small sizes in the interpreter")
    args = parser.parse_args()
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if args.tiny and not is_interpreted:
        print("--tiny runs the kernels in the interpreter; set TRITON_INTERPRET=1")
        return 2
    if not args.tiny and not torch.cuda.is_available():
        print("tune needs a CUDA device, found none; --tiny tries it on the CPU")
        return 2
    chosen = by_distance(tasks(args.tiny), args.after)
    limit = 2 * args.task_seconds + 40  # imports, inputs and the float64 truth on top
    device = "cpu" if args.tiny else "cuda"
    cases = [
        SuiteCase(
            task.name, functools.partial(measure_task, task, args.task_seconds), limit, device
        )
        for task in chosen
    ]
    return run_suite(cases, args)


if __name__ == "__main__":
    sys.exit(main())
