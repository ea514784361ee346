"""The field's headline claims, tried with our own trainer: learning, cost of a step, equivalence.

python benchmarks/headlines.py [--seeds 0 1] [--only CLAIM ...] [--jobs 2] [--json PATH] [--quick]

Learning is on the demo task (headline_runs.py), the cost of a step that of a larger model
(headline_steps.py), and the shared prefix is beside the PrefixGrouper package where that is
installed (headline_prefix.py). Every run is a process of its own, and what it found is kept below
runs/headlines: a second call does what is missing, or what was done otherwise. --quick tries
everything at tiny sizes, and keeps it elsewhere. The tables are `render`'s, of
headline_report.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from headline_cases import CLAIMS, SEEDS, config_of
from headline_prefix import SHAPES, prefix_cost
from headline_report import render
from headline_runs import learn, make_warm_start
from headline_steps import describe, step_cost
from rows import environment

from fastrl.config_io import as_paths

ROOT = Path(__file__).parent.parent
QUICK_STEPS = 2


class Job(NamedTuple):
    """One process and the file that keeps what it finds."""

    kind: str
    name: str
    seed: int
    settings: dict[str, Any]
    """All that the result depends on besides the code: another one makes it stale."""

    def path(self, kept: Path) -> Path:
        """Letters and digits of the names."""
        name = "".join(letter if letter.isalnum() else "_" for letter in self.name)
        return kept / self.kind / f"{name}-{self.seed}.json"

    def found(self, kept: Path) -> dict[str, Any] | None:
        """What is kept of it; None where that is nothing, or was done with other settings."""
        path = self.path(kept)
        if not path.exists():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = json.dumps(result["settings"]) == json.dumps(self.settings)
        return result if same else None


def jobs_of(claims: Iterable[str], seeds: Iterable[int], quick: bool) -> list[Job]:
    """What the claims need; what several need, once."""
    learners = {name: None for claim in claims for name in CLAIMS[claim].learners}
    steps = {name: None for claim in claims for name in CLAIMS[claim].settings}
    found: list[Job] = []
    for seed in seeds:
        found += [
            Job("learning", name, seed, {"quick": quick, **_of_learner(name, seed)})
            for name in learners
        ]
        found += [Job("steps", name, seed, describe(name, quick)) for name in steps]
        if "prefix_grouper" in claims:
            found += [
                Job("prefix", str(shape), seed, {"quick": quick, **shape._asdict()})
                for shape in SHAPES
            ]
    return found


def _of_learner(name: str, seed: int) -> dict[str, Any]:
    config = as_paths(config_of(name, seed, Path("run")))
    return {key: value for key, value in config.items() if value is not None}


def do(job: Job, kept: Path, quick: bool) -> dict[str, Any]:
    """In a process of its own."""
    if job.kind == "learning":
        steps = QUICK_STEPS if quick else None
        found = learn(job.name, job.seed, kept / "warm_starts", steps)
    elif job.kind == "steps":
        found = step_cost(job.name, job.seed, quick)
    else:
        shape = next(shape for shape in SHAPES if str(shape) == job.name)
        found = prefix_cost(shape, job.seed, quick)
    result = {**found, "settings": job.settings, "environment": environment("cpu")}
    path = job.path(kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.replace(path)
    return result


def run_all(jobs: list[Job], kept: Path, *, num_jobs: int, quick: bool) -> list[str]:
    """Whatever is missing, several at a time; returns one line for each that failed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    missing = [job for job in jobs if job.found(kept) is None]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there already", flush=True)
    context = multiprocessing.get_context("spawn")
    failures = []
    with ProcessPoolExecutor(num_jobs, mp_context=context, max_tasks_per_child=1) as pool:
        seeds = dict.fromkeys(job.seed for job in missing if job.kind == "learning")
        warm = [pool.submit(make_warm_start, seed, kept / "warm_starts") for seed in seeds]
        for future in warm:
            future.result()
        futures: dict[Future[Any], Job] = {
            pool.submit(do, job, kept, quick): job for job in missing
        }
        for number, future in enumerate(as_completed(futures), 1):
            job, error = futures[future], future.exception()
            done = "done" if error is None else f"failed: {type(error).__name__}: {error}"
            line = f"{job.kind} {job.name}, seed {job.seed}: {done}"
            print(f"[{number}/{len(missing)}] {line}", flush=True)
            if error is not None:
                failures.append(line)
    return failures


def collect(jobs: list[Job], kept: Path) -> dict[str, Any]:
    """Everything that is there, with what it was measured on."""
    results: dict[str, Any] = {"environment": {}, "learning": [], "steps": [], "prefix": []}
    commits: dict[str, None] = {}
    for job in jobs:
        found = job.found(kept)
        if found is None:
            continue
        results[job.kind].append(
            {key: value for key, value in found.items() if key not in ("settings", "environment")}
        )
        where = {**found["environment"], "command": " ".join(["python", *sys.argv])}
        commits[where["commit"]] = None
        results["environment"] = {**where, "commit": " and ".join(commits)}
    return results


def main() -> int:
    """1 where a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--kept", type=Path, default=ROOT / "runs" / "headlines",
                        help="where runs are kept")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the benchmark")
    args = parser.parse_args()
    kept = args.kept / "quick" if args.quick else args.kept
    jobs = jobs_of(args.only, args.seeds, args.quick)
    failures = run_all(jobs, kept, num_jobs=args.jobs, quick=args.quick)
    results = collect(jobs, kept)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(render(results))
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
