"""Turn finished demo runs into committed results and the README's demo section.

for seed in 0 1 2; do
    fastrl train examples/demo.toml --seed $seed --output-dir runs/demo-$seed --overwrite
done
python benchmarks/report_demo.py runs/demo-0 runs/demo-1 runs/demo-2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores" / "demo.json"
CURVE = ROOT / "docs" / "demo_curve.png"
README = ROOT / "README.md"
NEWLINE = "\n"  # before Python 3.12 an f-string expression holds no backslash
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def collect(runs: list[Path]) -> dict[str, Any]:
    """The summaries of the runs with what they ran on; wall_seconds is the whole process."""
    return {
        "command": "fastrl train examples/demo.toml --seed SEED --output-dir RUN --overwrite",
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": _commit(),
        "runs": [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs],
    }


def render(results: dict[str, Any]) -> str:
    """The README's section."""
    runs = results["runs"]
    versions = ", ".join(f"{name} {number}" for name, number in runs[0]["versions"].items())
    rows = [
        f"| {run['seed']} | {run['pass_at_1_before']:.3f} | {run['pass_at_1_after']:.3f} "
        f"| +{run['pass_at_1_after'] - run['pass_at_1_before']:.3f} | {run['train_seconds']:.0f} "
        f"| {run['tokens_per_second']:.0f} | {run['peak_memory_bytes'] / 2**30:.2f} |"
        for run in runs
    ]
    first = runs[0]
    size = f"{first['num_parameters'] / 1e6:.2f}M"
    return f"""\
A Qwen3-architecture policy of {size} parameters, built from a config, learns sums and differences
of three one-digit numbers (`reasoning_gym:chain_sum`, its own verifier as reward).
After {first["warm_start_steps"]} supervised steps, {first["steps"]} steps of GRPO (G = 8,
clip-higher, token mean, no KL) lift held-out pass@1, sampled at temperature 1:

| seed | warm start | after GRPO | gain | training, s | tokens/s | peak GiB |
|---|---|---|---|---|---|---|
{NEWLINE.join(rows)}

![pass rate over the steps of the demo, seed {first["seed"]}](docs/demo_curve.png)

{results["num_cores"]} cores of {results["cpu"]}, float32, Python {results["python"]}, {versions}.
Training time is warm start and GRPO; tokens are prompt and completion tokens of the rollouts.
Command, at commit {results["commit"]}: `{results["command"]}`."""


def replace_section(text: str, section: str) -> str:
    """The README with the part between the demo markers replaced."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{section}\n{END}{tail}"


def _commit() -> str:
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def main() -> None:
    """Collect, commit to disk, render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, the first one drawn")
    runs = parser.parse_args().runs
    results = collect(runs)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shutil.copy(runs[0] / "curve.png", CURVE)
    text = README.read_text(encoding="utf-8")
    README.write_text(replace_section(text, render(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
