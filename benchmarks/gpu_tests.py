"""The tests that need a GPU, the most telling first, within a time.

python benchmarks/gpu_tests.py [--seconds 400] [--workers 6] [--json FILE] [PYTEST OPTION ...]

Most of their time is that of compiling kernels, so several processes share them out, which takes
nothing but pytest. Whatever a test does to its process, the others go on: one that breaks the CUDA
context, ends its process or takes too long has failed, and the rest run in a new one. Those that
found no memory beside others run again alone. The file has every test with its outcome (passed,
failed, skipped or not run), and is there at any time. Returns 0 where all passed or are skipped, 1
where some failed, 124 where the time was over before all were done.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST = (
    "tests/kernels/test_kernels_on_gpu.py",
    "tests/kernels/test_real_heads_on_gpu.py",
    "tests/kernels/test_real_attention_on_gpu.py",
    "tests/kernels/test_nf4_on_gpu.py",
    "tests/test_gpu.py",
    "tests/test_optim_gpu.py",
    "tests/kernels/test_decode_attention_on_gpu.py",
    "tests/test_native.py",
    "tests/test_memory_plan.py",
)
MARK = re.compile(r"^\s*(@?pytest\.mark\.gpu\b|pytestmark = MARKS)", re.MULTILINE)
PLUGIN = "gpu_test_worker"
NO_MEMORY = ("OutOfMemoryError", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
EVERY_SECONDS = 0.2
ENDS = 400  # characters of a failure that are printed: its last lines
STARTS_WITHOUT_A_TEST = 3  # processes in a row that end before they begin one


@dataclass
class Found:
    """What became of a test."""

    test: str
    outcome: str
    """passed, failed, skipped, or not run"""
    seconds: float = 0.0
    told: str = ""
    """Of a failure all that pytest says; else why."""


@dataclass
class Results:
    """What the processes have written so far."""

    tests: list[str] = field(default_factory=list)
    by_test: dict[str, Found] = field(default_factory=dict)
    begun: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Of tests without an outcome: the process that runs them, and since when."""
    broken: dict[str, str] = field(default_factory=dict)
    """What a process said when its device answered no more."""

    def running(self, worker: str) -> tuple[str, float] | None:
        """The test that a process has begun and not ended, and when it began."""
        own = [(test, at) for test, (name, at) in self.begun.items() if name == worker]
        return own[-1] if own else None

    def all(self) -> list[Found]:
        """Every test in the order of the list, also those that have not run."""
        names = dict.fromkeys([*self.tests, *self.by_test])
        return [self.by_test.get(name, self._missing(name)) for name in names]

    def _missing(self, test: str) -> Found:
        since = self.begun.get(test)
        told = f"ran for {time.time() - since[1]:.0f} s when it was stopped" if since else ""
        return Found(test, "not run", told=told)


def files() -> list[str]:
    """All that have such tests, in the order in which they are run."""
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if MARK.search(path.read_text(encoding="utf-8"))
    }
    return [*FIRST, *sorted(marked - set(FIRST))]


def command(options: Sequence[str], names: Sequence[str]) -> list[str]:
    """What each process runs."""
    found = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", PLUGIN]
    found += ["-p", "no:randomly", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return [*found, *options, *names]


def read(folder: Path) -> Results:
    """What all processes wrote; a line that is not complete yet is left for the next time."""
    results = Results()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            found = json.loads(line)
            if "all" in found:
                results.tests = max(results.tests, found["all"], key=len)
            elif "begun" in found:
                results.begun[found["begun"]] = (path.stem, found["at"])
            elif "broken" in found:
                results.broken[path.stem] = found["broken"]
            else:
                results.by_test[found["test"]] = Found(**found)
    for test in results.by_test:
        results.begun.pop(test, None)
    return results


def innermost(log: str) -> str:
    """Where a process was that was stopped: the first lines of what faulthandler wrote last."""
    _, found, stack = log.rpartition("Current thread")
    return "\n".join([*stack.splitlines()[1:4], ""]) if found else ""


class Pool:
    """The processes, each in a session of its own so that what it starts ends with it."""

    def __init__(self, folder: Path, options: Sequence[str], names: Sequence[str], root: Path):
        self.folder, self.root = folder, root
        self.command = command(options, names)
        self.live: dict[str, subprocess.Popen[bytes]] = {}
        self.num_started = self.num_idle_ends = 0
        (folder / "begun").mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """One more."""
        self.num_started += 1
        name = f"{self.num_started:03}"
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        settings = {"GPU_TESTS_FOLDER": str(self.folder), "GPU_TESTS_WORKER": name}
        environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with (self.folder / f"{name}.log").open("wb") as log:
            self.live[name] = subprocess.Popen(
                self.command, cwd=self.root, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def end(self, name: str) -> None:
        """That one, now; what it began counts as stopped."""
        process = self.live.pop(name)
        for number in (signal.SIGABRT, signal.SIGKILL):  # the first has pytest say where it is
            if process.poll() is None:
                os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)
        process.wait()

    def tend(self, test_seconds: float) -> None:
        """Note those that died or take too long, and go on without them in new ones."""
        results = read(self.folder)
        for name, process in list(self.live.items()):
            now = results.running(name)
            if process.poll() is None:
                if now is None or time.time() - now[1] <= test_seconds:
                    continue
                why = f"killed after {test_seconds:.0f} s"
            else:
                why = f"ended its process, status {process.returncode}"
            self.end(name)
            log = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
            if now is not None:
                told = f"{log[-4000:]}\n{innermost(log)}{why}"
                self.note(Found(now[0], "failed", time.time() - now[1], told), name)
            elif name in results.broken or process.returncode not in (0, 1, 5):
                self.num_idle_ends += name not in results.broken
            else:
                continue  # it found nothing left to begin
            if self.num_idle_ends < STARTS_WITHOUT_A_TEST:
                self.start()
            elif not self.live:
                print(f"no process begins a test; the last one said:\n{log[-4000:]}")

    def note(self, found: Found, name: str) -> None:
        """Write down a test whose process cannot."""
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found)) + "\n")


def run(
    folder: Path, *, options: Sequence[str], names: Sequence[str], root: Path, workers: int,
    until: float, test_seconds: float, path: Path | None,
) -> Results:  # fmt: skip
    """Share the tests out to processes until all are done or the time is over."""
    pool = Pool(folder, options, names, root)
    for _ in range(workers):
        pool.start()
    told: set[str] = set()
    written = 0.0
    try:
        while pool.live and time.time() < until:
            time.sleep(EVERY_SECONDS)
            pool.tend(test_seconds)
            results = read(folder)
            failures = {x.test: x for x in results.by_test.values() if x.outcome == "failed"}
            for test in failures.keys() - told:
                print(f"FAILED {test} ({failures[test].seconds:.0f} s)", flush=True)
            told |= failures.keys()
            if time.time() - written > 10:
                write_results(path, results)
                written = time.time()
    finally:
        for name in list(pool.live):
            pool.end(name)
    return read(folder)


def without_memory(results: Results) -> list[str]:
    """Tests that failed because others had the memory, or that may have."""
    failed = [x for x in results.by_test.values() if x.outcome == "failed"]
    return [x.test for x in failed if any(words in x.told for words in NO_MEMORY)]


def write_results(path: Path | None, results: Results) -> None:
    """All tests so far, after what they ran on; the file appears when it is complete."""
    if path is None:
        return
    found = results.all()
    text = {
        "environment": environment(),
        "counts": dict(Counter(x.outcome for x in found)),
        "tests": [asdict(x) for x in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


@functools.cache
def environment() -> dict[str, str]:
    """What the tests ran on; imports torch, which who only wants the list of files need not."""
    import rows
    import torch

    return rows.environment("cuda" if torch.cuda.is_available() else "cpu")


def report(results: Results, seconds: float) -> str:
    """What did not pass, with its last words; then how many did."""
    found = results.all()
    lines = []
    for test in (x for x in found if x.outcome == "failed"):
        lines += [f"--- failed {test.test} ({test.seconds:.0f} s)", test.told[-ENDS:].strip()]
    lines += [f"skipped {x.test}: {x.told}" for x in found if x.outcome == "skipped"]
    lines += [f"not run {x.test} {x.told}".strip() for x in found if x.outcome == "not run"]
    slow = sorted(found, key=lambda x: -x.seconds)[:8]
    lines += [f"{x.seconds:7.1f} s {x.test}" for x in slow if x.seconds > 1]
    counts = Counter(x.outcome for x in found)
    return "\n".join([
        *lines,
        ", ".join(f"{counts[name]} {name}" for name in ("failed", "passed", "skipped", "not run"))
        + f" of {len(found)} tests in {seconds:.0f} s",
    ])  # fmt: skip


def exit_status(results: Results) -> int:
    """See the top of the file; a list without a test is a failure too."""
    outcomes = {x.outcome for x in results.all()}
    if "failed" in outcomes or not outcomes:
        return 1
    return 124 if "not run" in outcomes else 0


def main() -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=400.0, help="for all of them")
    parser.add_argument("--workers", type=int, default=6, help="processes")
    parser.add_argument("--test-seconds", type=float, default=180.0, help="for one of them")
    parser.add_argument("--json", type=Path, help="where results are written, while it runs too")
    args, options = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end too
    start = time.time()
    folder = Path(tempfile.mkdtemp(prefix="gpu_tests_"))
    settings = {
        "options": options, "names": files(), "root": ROOT, "until": start + args.seconds,
        "test_seconds": args.test_seconds, "path": args.json,
    }  # fmt: skip
    results = run(folder / "first", workers=args.workers, **settings)
    again = without_memory(results)
    if again and args.workers > 1:
        print(f"{len(again)} found no memory beside others and run again, one after the other")
        alone = run(folder / "alone", workers=1, **(settings | {"names": again}))
        results.by_test.update(alone.by_test)
    write_results(args.json, results)
    print(report(results, time.time() - start))
    shutil.rmtree(folder)
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
