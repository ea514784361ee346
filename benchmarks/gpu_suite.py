"""Everything worth knowing about head, attention and selection on one GPU, within nine minutes.

python benchmarks/gpu_suite.py [--json PATH] [--seconds 530] [--tiny]

The most valuable cases come first. Each runs in a process of its own with a time limit, and its
rows are in the JSON before the next one starts. Peers take part where they are installed. --tiny
runs the same cases at small sizes on the CPU, to try the suite itself.

S selected tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
from attention_cases import attention_loaders
from compare import exit_status, measure_case
from decode_cases import decode_loaders
from implementations import load, logps_loaders, policy_loaders
from logits_cases import forward_loaders, selected_loaders
from rows import Row, environment, write_json
from suite_cases import GROUPS, SuiteCase, suite_cases

TIMING_SECONDS = 12.0  # of each case; loading, checks and compilation come on top


def main() -> int:
    """Run all cases; 2 without a GPU, 1 where one of our implementations is not correct."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here, after every case")
    parser.add_argument("--seconds", type=float, default=530, help="for all cases together")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print("gpu_suite needs a CUDA device, found none; --tiny runs the same cases on the CPU")
        return 2
    device = "cpu" if args.tiny else "cuda"
    loaders = policy_loaders() | logps_loaders() | selected_loaders() | forward_loaders()
    of_attention = (item.case for item in suite_cases(args.tiny) if item.group == "attention")
    loaders |= attention_loaders(next(of_attention).shape) | decode_loaders()
    for line in load(loaders, device).absent:
        print(f"absent: {line}")
    rows: list[Row] = []
    deadline = time.monotonic() + args.seconds
    for suite_case in suite_cases(args.tiny):
        limit = min(suite_case.limit_seconds, deadline - time.monotonic())
        rows += run_in_process(suite_case, limit, device)
        write_json(args.json, rows)
    return exit_status(rows)


def run_in_process(suite_case: SuiteCase, limit: float, device: str) -> list[Row]:
    """Rows of one case, or one row that says why there are none."""
    if limit < 10:
        return [failure(suite_case, "skipped: the suite's time was used up", device)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        process = multiprocessing.get_context("spawn").Process(
            target=run_case, args=(suite_case, path)
        )
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            return [failure(suite_case, f"killed after {limit:.0f} s", device)]
        if not path.exists():
            reason = f"its process ended with status {process.exitcode}"
            return [failure(suite_case, reason, device)]
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def run_case(suite_case: SuiteCase, path: Path) -> None:
    """One case in this process; the command line in its rows is the parent's."""
    on_gpu = suite_case.case.shape.device == "cuda"
    rows = measure_case(
        str(suite_case),
        suite_case.case,
        GROUPS[suite_case.group],
        seconds=TIMING_SECONDS if on_gpu else 0.0,
        with_memory=on_gpu,
    )
    sys.stdout.flush()
    write_json(path, rows)


def failure(suite_case: SuiteCase, reason: str, device: str) -> Row:
    """A row for a case without results."""
    print(f"\n{suite_case}\n{reason}", flush=True)
    return Row(
        case=str(suite_case),
        implementation="all",
        correct=False,
        environment=environment(device),
        note=reason,
    )


if __name__ == "__main__":
    sys.exit(main())
