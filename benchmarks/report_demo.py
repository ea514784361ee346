"""Turn finished demo runs into committed results and the README's demo section.

for seed in 0 1 2; do
    fastrl train examples/demo.toml --seed $seed --output-dir runs/demo-$seed --overwrite
done
python benchmarks/report_demo.py runs/demo-0 runs/demo-1 runs/demo-2

The same of another example: its name after --example (demo_ppo, demo_astar_po). Its results stand
in docs/results.md alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from stamps import stamp

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results" / "cpu-2-cores"
RESULTS = FOLDER / "demo.json"
CURVE = ROOT / "docs" / "demo_curve.png"
README = ROOT / "README.md"
NEWLINE = "\n"  # before Python 3.12 an f-string expression holds no backslash
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
SAID = {  # of a method: its name, and how the example sets it
    "grpo": ("GRPO", "G = 8,\nclip-higher, token mean, no KL"),
    "ppo": ("PPO", "G = 8,\na value head on the policy's layers, lambda 1, clip-higher"),
    "astar_po": ("A*-PO", "one completion a prompt,\neight of the starting policy beforehand"),
}


def collect(runs: list[Path], example: str = "demo") -> dict[str, Any]:
    """The summaries of the runs of an example with what they ran on."""
    return {
        "command": f"fastrl train examples/{example}.toml --seed SEED --output-dir RUN --overwrite",
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": _commit(),
        "runs": [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs],
    }


def render(results: dict[str, Any]) -> str:
    """The README's section, or the same of another method; the picture is of GRPO."""
    runs = results["runs"]
    method, settings = SAID[runs[0]["method"]]
    versions = ", ".join(f"{name} {number}" for name, number in runs[0]["versions"].items())
    rows = [
        f"| {run['seed']} | {run['pass_at_1_before']:.3f} | {run['pass_at_1_after']:.3f} "
        f"| +{run['pass_at_1_after'] - run['pass_at_1_before']:.3f} | {run['train_seconds']:.0f} "
        f"| {run['tokens_per_second']:.0f} | {run['peak_memory_bytes'] / 2**30:.2f} |"
        for run in runs
    ]
    first = runs[0]
    size = f"{first['num_parameters'] / 1e6:.2f}M"
    drawn = f"![pass rate over the steps of the demo, seed {first['seed']}](docs/demo_curve.png)"
    picture = f"{drawn}{NEWLINE}{NEWLINE}" if first["method"] == "grpo" else ""
    learned = f"{first['steps']} steps of {method} ({settings}) lift held-out pass@1"
    threads = "one thread" if first["num_threads"] == 1 else f"{first['num_threads']} threads"
    cores = f"{results['num_cores']} cores of {results['cpu']}, {threads} a run"
    return f"""\
A Qwen3-architecture policy of {size} parameters, built from a config, learns sums and differences
of three one-digit numbers (`reasoning_gym:chain_sum`, its own verifier as reward).
After {first["warm_start_steps"]} supervised steps, {learned}, sampled at temperature 1:

| seed | warm start | after {method} | gain | training, s | tokens/s | peak GiB |
|---|---|---|---|---|---|---|
{NEWLINE.join(rows)}

{picture}{cores}, float32, Python {results["python"]}, {versions}.
Training time is warm start and {method}; tokens are prompt and completion tokens of the rollouts.
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
    parser.add_argument("--example", default="demo", help="which file of examples/ was run")
    args = parser.parse_args()
    results = collect(args.runs, args.example)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{args.example}.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if path == RESULTS:
        stamp(args.runs[0] / "curve.png", CURVE, results)
        text = README.read_text(encoding="utf-8")
        README.write_text(replace_section(text, render(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
