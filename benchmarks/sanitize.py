"""Run every Triton kernel once on small odd shapes, plain or under compute-sanitizer.

python benchmarks/sanitize.py [--tool memcheck|racecheck|initcheck|synccheck] [--only TEXT ...]

Each case has a process of its own with a time limit, and one line: whether results and gradients
agree with float64 on the CPU, which kernels were launched how often, and with --tool the number of
errors that compute-sanitizer reports. Returns 1 where a case fails, 2 where the tool or the device
is missing. Without a GPU, TRITON_INTERPRET=1 runs the same cases in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import ProcessLost, in_fresh_process
from sanitize_cases import CASES, Case

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
REPORTED = 86  # exit status of the tool where it has found something


class Outcome(NamedTuple):
    """What became of a case."""

    is_fine: bool
    told: str
    """In one line."""


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """How often each Triton kernel is launched within, by its name."""
    from triton.runtime import interpreter, jit

    counts: Counter[str] = Counter()
    originals = {kind: kind.run for kind in (jit.JITFunction, interpreter.InterpretedFunction)}

    def counting(original: Any) -> Any:
        def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            counts[kernel.__name__] += 1
            return original(kernel, *args, **kwargs)

        return run

    for kind, original in originals.items():
        kind.run = counting(original)
    try:
        yield counts
    finally:
        for kind, original in originals.items():
            kind.run = original


def attempt(case: Case, device: str) -> Outcome:
    """One case in this process: its kernels, all of them, and its numbers."""
    with counted_launches() as counts:
        found = case.run(device)
        if device == "cuda":
            torch.cuda.synchronize()
    wrong = case.differences(found)
    missing = sorted(case.kernels ^ counts.keys())
    launches = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
    if missing:
        return Outcome(False, f"expected {sorted(case.kernels)}, launched {launches}")
    if wrong:
        return Outcome(False, f"{wrong} ({launches})")
    return Outcome(True, launches)


def plain(case: Case, device: str, limit: float) -> Outcome:
    """The same in a fresh process, so that a fault of one kernel leaves the others their device."""
    try:
        found: Outcome = in_fresh_process(attempt, case, device, limit_seconds=limit)
    except ProcessLost as reason:
        return Outcome(False, str(reason))
    except Exception as error:  # of one kernel; the other ones are still worth it
        message = (str(error).splitlines() or [""])[0][:200]
        return Outcome(False, f"{type(error).__name__}: {message}")
    return found


def under_tool(case: Case, tool: str, sanitizer: str, limit: float) -> Outcome:
    """The case under compute-sanitizer, with an allocation for each tensor, which it can watch."""
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", str(REPORTED),
        "--target-processes", "application-only",
        sys.executable, __file__, "--here", "--only", case.name,
    ]  # fmt: skip
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(False, f"killed after {limit:.0f} s")
    return verdict(tool, answer.returncode, answer.stdout + answer.stderr)


def verdict(tool: str, status: int, output: str) -> Outcome:
    """What the tool's report says; a report without a summary is no good news."""
    totals = [int(one or other) for one, other in SUMMARY.findall(output)]
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    first = next((line.strip("= ") for line in lines[1:] if line.strip("= ")), "")
    if not totals:
        last = (output.strip().splitlines() or ["nothing"])[-1][:200]
        return Outcome(False, f"{tool} reports no summary, status {status}: {last}")
    if max(totals) or status == REPORTED:
        return Outcome(False, f"{tool}: {max(totals)} errors; {first[:200]}")
    if status:
        told = [line for line in output.splitlines() if line.startswith("failed")]
        return Outcome(False, f"{tool}: no errors, but status {status}: {' '.join(told)[:300]}")
    return Outcome(True, f"{tool}: 0 errors")


def find_sanitizer() -> str | None:
    """compute-sanitizer on the path, beside CUDA, or in NVIDIA's Python packages."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    roots = [Path(home) for home in (*homes, "/usr/local/cuda") if home]
    spec = find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        roots += [Path(place), *Path(place).iterdir()]
    for root in roots:
        for folder in ("bin", "compute-sanitizer"):
            path = root / folder / "compute-sanitizer"
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return None


def obstacle(tool: str | None, device: str, sanitizer: str | None) -> str | None:
    """Why nothing can be run here, in one line."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "sanitize needs a CUDA device, found none; TRITON_INTERPRET=1 interprets the kernels"
    if tool is None:
        return None
    if device == "cpu":
        return f"--tool {tool} needs a CUDA device, found none; leave it out"
    if sanitizer is None:
        return (
            f"--tool {tool} needs compute-sanitizer, found none on PATH, in CUDA_HOME or in "
            "NVIDIA's packages; install the CUDA toolkit"
        )
    return None


def is_meant(name: str, text: str) -> bool:
    """A whole name means that case alone, everything else those that have it in their name."""
    return name == text or (text in name and text not in [case.name for case in CASES])


def run_all(cases: Sequence[Case], args: argparse.Namespace, device: str, sanitizer: str) -> int:
    """One line a case, in their order; 1 where one failed."""

    def one(case: Case) -> tuple[Outcome, float]:
        began = time.monotonic()
        if args.tool is not None:
            outcome = under_tool(case, args.tool, sanitizer, args.limit)
        elif args.here:
            outcome = attempt(case, device)
        else:
            outcome = plain(case, device, args.limit)
        return outcome, time.monotonic() - began

    num_failed = 0
    with ThreadPoolExecutor(args.jobs if args.tool is not None else 1) as pool:
        for case, (outcome, seconds) in zip(cases, pool.map(one, cases), strict=True):
            num_failed += not outcome.is_fine
            word = "fine  " if outcome.is_fine else "failed"
            print(f"{word} {case.name:34} {seconds:6.1f} s  {outcome.told}", flush=True)
    print(f"{len(cases)} cases, {num_failed} failed")
    return int(num_failed > 0)


def main() -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tool", choices=TOOLS, help="of compute-sanitizer; plain without it")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases by name")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of one case")
    parser.add_argument("--jobs", type=int, default=4, help="cases at a time with --tool")
    parser.add_argument("--here", action="store_true", help="without processes of their own")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sanitizer = find_sanitizer()
    line = obstacle(args.tool, device, sanitizer)
    if line is not None:
        print(line)
        return 2
    chosen = [case for case in CASES if any(is_meant(case.name, text) for text in args.only)]
    if not chosen:
        print(f"no case has {args.only} in its name; there are {[case.name for case in CASES]}")
        return 2
    return run_all(chosen, args, device, sanitizer or "")


if __name__ == "__main__":
    sys.exit(main())
