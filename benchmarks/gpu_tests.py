"""The tests that need a GPU, the most telling first, within a time.

python benchmarks/gpu_tests.py [--seconds 400] [--workers 6] [PYTEST OPTION ...]

Most of their time is that of compiling kernels, which pytest-xdist spreads over processes where it
is installed. A file that cannot be imported is reported, and the others still run. Returns
pytest's status, 124 where the time was over.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST = (
    "tests/kernels/test_kernels_on_gpu.py",
    "tests/kernels/test_real_heads_on_gpu.py",
    "tests/kernels/test_real_attention_on_gpu.py",
    "tests/test_gpu.py",
    "tests/test_optim_gpu.py",
    "tests/kernels/test_decode_attention_on_gpu.py",
    "tests/test_native.py",
    "tests/test_memory_plan.py",
)
MARK = re.compile(r"^\s*(@?pytest\.mark\.gpu\b|pytestmark = MARKS)", re.MULTILINE)


def files() -> list[str]:
    """All that have such tests, in the order in which they are run."""
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if MARK.search(path.read_text(encoding="utf-8"))
    }
    return [*FIRST, *sorted(marked - set(FIRST))]


def command(workers: int, options: list[str]) -> list[str]:
    """What is run, with the plugins that are there."""
    found = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--durations=15"]
    found += ["-p", "no:randomly", "--continue-on-collection-errors"]
    if workers > 1 and find_spec("xdist") is not None:
        found += ["-n", str(workers), "--dist", "worksteal"]
    if find_spec("pytest_timeout") is not None:
        found += ["--timeout", "180"]
    return [*found, *options, *files()]


def main() -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=400.0, help="for all of them")
    parser.add_argument("--workers", type=int, default=6, help="processes, with pytest-xdist")
    args, options = parser.parse_known_args()
    process = subprocess.Popen(command(args.workers, options), cwd=ROOT, start_new_session=True)
    try:
        return process.wait(args.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then says what has failed so far
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        print(f"stopped after {args.seconds:.0f} s: the tests that had not run are missing above")
        return 124


if __name__ == "__main__":
    sys.exit(main())
