"""D3S against plain GRPO on the demo task: reward as a function of trained tokens, five seeds.

for seed in 0 1 2 3 4; do
    for method in grpo d3s; do
        fastrl train examples/demo.toml --method $method --seed $seed \
            --output-dir runs/$method-$seed --overwrite
    done
done
python benchmarks/report_study.py runs

A trained token is a row at the head in a pass with gradient. Writes the numbers, the figure and the
section of docs/training.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from report_demo import ROOT, _commit, _cpu_name

from fastrl.report import read_metrics

RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores" / "d3s_study.json"
FIGURE = ROOT / "docs" / "d3s_study.png"
DOCUMENT = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
METHODS = {"grpo": "tab:blue", "d3s": "tab:orange"}
SEEDS = range(5)
WINDOW = 10  # steps that a reward is averaged over
NEWLINE = "\n"


def collect(runs: Path) -> dict[str, Any]:
    """Curves and summaries of all runs."""
    first = json.loads((runs / "grpo-0" / "summary.json").read_text(encoding="utf-8"))
    return {
        "command": "fastrl train examples/demo.toml --method METHOD --seed SEED --output-dir "
        "runs/METHOD-SEED --overwrite",
        "cpu": _cpu_name(),
        "num_threads": first["num_threads"],
        "versions": first["versions"],
        "commit": _commit(),
        "runs": [run_of(runs, method, seed) for method in METHODS for seed in SEEDS],
    }


def run_of(runs: Path, method: str, seed: int) -> dict[str, Any]:
    """One run: per step the tokens trained so far and the mean reward of its completions."""
    directory = runs / f"{method}-{seed}"
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    steps = [row for row in read_metrics(directory) if "reward" in row]
    num_completions = 1024  # of a step of the demo
    trained = [
        round(num_completions * row["completions/mean_length"] - row["down_sampling/rows_skipped"])
        for row in steps
    ]
    return {
        "method": method,
        "seed": seed,
        "pass_at_1_before": summary["pass_at_1_before"],
        "pass_at_1_after": summary["pass_at_1_after"],
        "trained_tokens": np.cumsum(trained).tolist(),
        "reward": [round(row["reward"], 4) for row in steps],
        "update_seconds": sum(row["time/train"] for row in steps),
    }


def curve(run: dict[str, Any]) -> tuple[Any, Any]:
    """Tokens trained, and the reward averaged over the last WINDOW steps."""
    kernel = np.ones(WINDOW) / WINDOW
    return (
        np.array(run["trained_tokens"])[WINDOW - 1 :],
        np.convolve(run["reward"], kernel, "valid"),
    )


def reward_at(run: dict[str, Any], tokens: float) -> float:
    """The averaged reward when so many tokens have been trained."""
    return float(np.interp(tokens, *curve(run)))


def render(results: dict[str, Any]) -> str:
    """The section of the document."""
    of = {m: [run for run in results["runs"] if run["method"] == m] for m in METHODS}
    total = {m: float(np.mean([run["trained_tokens"][-1] for run in of[m]])) for m in METHODS}
    shares = (0.25, 0.5, 1.0)
    least = min(run["trained_tokens"][-1] for run in results["runs"])
    lines = [
        "| method | held-out pass@1, before | after | trained tokens | update, s | "
        + " | ".join(f"reward at {share * least / 1e3:.0f}k tokens" for share in shares)
        + " |",
        "|" + "---|" * (5 + len(shares)),
    ]
    for method, runs in of.items():
        cells = [
            method,
            _spread([run["pass_at_1_before"] for run in runs]),
            _spread([run["pass_at_1_after"] for run in runs]),
            f"{total[method] / 1e3:.0f}k",
            f"{np.mean([run['update_seconds'] for run in runs]):.0f}",
            *(_spread([reward_at(run, share * least) for run in runs]) for share in shares),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"""\
{NEWLINE.join(lines)}

![reward over trained tokens, five seeds of each method](d3s_study.png)

Means over five seeds, with the lowest and the highest; a reward is the mean of {WINDOW} steps.
{results["cpu"]}, {results["num_threads"]} thread, float32, {versions}.
Command, at commit {results["commit"]}:
`{results["command"]}`,
then `python benchmarks/report_study.py runs`."""


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def draw(results: dict[str, Any]) -> None:
    """Every run thin, the mean of a method thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for method, color in METHODS.items():
        runs = [run for run in results["runs"] if run["method"] == method]
        for run in runs:
            axes.plot(*curve(run), color=color, alpha=0.25, linewidth=0.8)
        last = min(run["trained_tokens"][-1] for run in runs)
        first = max(curve(run)[0][0] for run in runs)
        tokens = np.linspace(first, last, 200)
        mean = np.mean([[reward_at(run, x) for x in tokens] for run in runs], axis=0)
        axes.plot(tokens, mean, color=color, linewidth=2, label=method)
    axes.set(xlabel="trained tokens", ylabel=f"reward, mean of {WINDOW} steps", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(FIGURE, dpi=120)
    pyplot.close(figure)


def replace_section(text: str, section: str) -> str:
    """The document with the part between the markers replaced."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Collect, draw, render."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="directory of the runs METHOD-SEED")
    results = collect(parser.parse_args().runs)
    RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
    draw(results)
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(replace_section(text, render(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
