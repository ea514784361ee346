"""Make docs/results.md and its pictures, and fill in every other document, from committed JSON.

python benchmarks/report_results.py

A file of benchmarks/results/<machine>/ becomes a section: what was measured, on what and with which
command. Rows become a table; what has another form is rendered by the module that wrote it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import report_rows
from committed import COMPILED, CPU, RESULTS, ROOT, Row, devices, read, rows_of
from goal_table import counts
from goal_table import table as goal_table
from pictures import budget_of, pictures, refresh
from stamps import digest, drawn_from, stamp

PAGE = ROOT / "docs" / "results.md"


class Section(NamedTuple):
    """What a file of results is about."""

    title: str
    text: str


ABOUT = {
    "demo": Section("The demo", "Three seeds of `make demo`."),
    "demo_ppo": Section("The demo with PPO", "Three seeds, a value head on the shared layers."),
    "demo_astar_po": Section("The demo with A*-PO", "Three seeds, one completion a prompt."),
    "trainer": Section(
        "Updates against TRL's",
        "From completions to new weights, the same model, completions, rewards and settings; "
        "memory is beyond weights and optimizer states. See [training](training.md#against-trl).",
    ),
    "drop_in": Section(
        "TRL's trainers, accelerated",
        "The same trainer of TRL, as it is and after `accelerate_trl`: from scored completions to "
        "new weights; memory is beyond weights, gradients and optimizer states. See "
        "[drop-in](drop_in.md#what-it-saves).",
    ),
    "methods": Section(
        "A*-PO, GRPO and PPO", "Whole steps of our own trainer; memory is all that it takes."
    ),
    "frontier": Section(
        "The longest context in a budget",
        "Of memory beyond weights and optimizer states; one prompt, two completions of half of it.",
    ),
    "memory_plan": Section(
        "Plans of memory",
        "What `fastrl plan` says of a run before it, and what the run then took: two steps and an "
        "evaluation, counted by torch's own allocator, each in a process of its own.",
    ),
    "scaling": Section(
        "Scaling", "Time and memory of an update against each size alone, with fitted exponents."
    ),
    "headlines": Section(
        "Claims of the field, on small models",
        "Each with five seeds, on the demo task and a model of 25M parameters: what came out. "
        "Seconds are those that the process had of one core, beside other work.",
    ),
    "d3s_study": Section("Down-sampling and learning", "D3S against GRPO on the demo task."),
    "shared_prefix": Section(
        "Shared prompts",
        "A Qwen3 of 25M parameters without its embedding, V = 32000; what the rows are is in "
        "[parts](modules.md#what-sharing-saves). Losses and gradients agree with float64 to 2e-5.",
    ),
    "policy_loss": Section(
        "Losses that never store logits",
        "Forward and backward with a trained head; rho is the part of the tokens that is trained. "
        "Memory is that of resident pages beyond the inputs.",
    ),
    "objectives": Section(
        "Objectives", "Forward and backward on log-probabilities that are there already."
    ),
    "selected_logps": Section("Logits in", "The same statistics for callers who hold logits."),
    "segment_attention": Section(
        "Attention", "A group's prompt once against every other way to the same outputs."
    ),
    "down_sampling": Section(
        "Down-sampling", "What is dropped against the same multiplied by zero; see "
        "[training](training.md#fewer-tokens).",
    ),
    "rollout": Section("Rollouts", "The same completions by every engine."),
    "step": Section("A whole step", "Of GRPO on the demo task, our trainer and TRL's."),
    "plans": Section("Plans", "From token ids to a packed row of about 64k tokens, on one thread."),
    "optimizer": Section(
        "The optimizer", "A step of AdamW by what weights and moments are kept in."
    ),
    "cpu_suite": Section("Everything on a CPU", "`benchmarks/cpu_suite.py`."),
    "gpu_suite": Section("Everything on a GPU", "`benchmarks/gpu_suite.py`."),
    "speed_gate": Section(
        "The gate", "What `benchmarks/speed_gate.py` compares before a change lands: CPU time."
    ),
    "kernel_resources": Section(
        "Machine code", "Every Triton kernel compiled for sm_80, sm_90, sm_100 and sm_120."
    ),
}  # fmt: skip


def render_demo(results: Any) -> str:
    """The README's section, with its picture seen from docs/."""
    return importlib.import_module("report_demo").render(results).replace("](docs/", "](")


def render_study(results: Any) -> str:
    """The section of docs/training.md."""
    return importlib.import_module("report_study").render(results)


def render_headlines(results: Any) -> str:
    """A table for each claim, below the file's own heading."""
    rendered = str(importlib.import_module("headline_report").render(results))
    return re.sub(r"^### ", "#### ", rendered, flags=re.MULTILINE)


def render_kernels(results: Any) -> str:
    """How many compilations, and how many of them failed."""
    rows = results["rows"]
    spilling = sum(bool(row["spilled_bytes"]) for row in rows)
    misfits = sum(not row["fits"] for row in rows)
    return (
        f"{len(rows)} compilations, {spilling} with spilled registers, {misfits} beyond the shared "
        "memory; the [table](../benchmarks/results/aot/kernel_resources.md).\n\n"
        f"Triton {results['triton']}: `{results['command']}`."
    )


def render_frontier(rows: list[Row]) -> str:
    """The longest context of each trainer by budget; its times are of other contexts each."""
    titles = ("budget, MiB", "trainer", "longest context", "peak MiB", "seconds")
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        seconds = "" if row["p50_ms"] is None else f"{row['p50_ms'] / 1000:.1f}"
        context = row["note"].removeprefix("context ")
        cells = [str(budget_of(row)), row["implementation"], context, peak, seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{report_rows.where(rows)}"


def render_memory_plan(rows: list[Row]) -> str:
    """A line for each configuration: its peak, and the phases whose plan is farthest off."""
    titles = ("configuration", "planned, MiB", "measured", "ratio", "farthest phase")
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for case in dict.fromkeys(row["case"] for row in rows):
        phases = {row["phase"]: row for row in rows if row["case"] == case}
        peak = phases.pop("peak")
        name = max(phases, key=lambda phase: abs(phases[phase]["ratio"] - 1))
        sizes = (f"{peak[key] / 2**20:.1f}" for key in ("predicted_bytes", "measured_bytes"))
        ratios = (f"{peak['ratio']:.3f}", f"{name}, {phases[name]['ratio']:.3f}")
        lines.append(f"| {' | '.join([case, *sizes, *ratios])} |")
    return "\n".join(lines) + f"\n\n{report_rows.where(rows)}"


RENDERERS: dict[str, Callable[[Any], str]] = {
    "demo": render_demo,
    "demo_ppo": render_demo,
    "demo_astar_po": render_demo,
    "d3s_study": render_study,
    "headlines": render_headlines,
    "frontier": render_frontier,
    "memory_plan": render_memory_plan,
    "kernel_resources": render_kernels,
}

INTRODUCTION = """\
# Results

Everything that was measured, whatever it shows, as benchmarks/results holds it. Times are medians
with the 20th and the 80th percentile; "time" and "memory" are relative to the first implementation
of ours in the case; a ratio is given only where outputs and gradients agreed with the reference in
the same run. Each section names machine, versions, commit and command.
`python benchmarks/report_results.py` makes this page and its pictures from the JSON."""


def page(results: Path = RESULTS) -> str:
    """docs/results.md."""
    met, missed, unknown = counts(results)
    parts = [
        INTRODUCTION,
        "## Goals",
        f"Set before the work began: {met} met, {missed} missed, {unknown} not measured. "
        "Those for a GPU wait for `benchmarks/gpu_suite.py` on one.",
        goal_table(results).rstrip(),
    ]
    for picture in pictures(results):
        if picture.data(results):
            parts.append(f"![{picture.caption}]({picture.name}.png)\n\n{picture.caption}.")
    for folder in (CPU, *devices(results), COMPILED):
        files = {path.stem: path for path in sorted((results / folder).glob("*.json"))}
        if files:
            parts.append(f"## Measured on {folder}" if folder != COMPILED else "## Compiled")
        order = [name for name in ABOUT if name in files]
        parts += [section(files[name]) for name in order + sorted(set(files) - set(order))]
    return "\n\n".join(parts) + "\n"


def section(path: Path) -> str:
    """One file of results."""
    about = ABOUT.get(path.stem, Section(path.stem.replace("_", " "), ""))
    content = read(path)
    rows = rows_of(content)
    if path.stem in RENDERERS:
        body = RENDERERS[path.stem](content)
    elif rows is not None:
        body = f"{report_rows.table(rows)}\n\n{report_rows.where(rows, content)}"
    else:
        raise ValueError(
            f"{path.name} holds no rows: add who renders it to RENDERERS in report_results.py"
        )
    source = f"[{path.name}](../benchmarks/results/{path.parent.name}/{path.name})"
    heading = f"### {about.title}\n\n{about.text} {source}".rstrip()
    return f"{heading}\n\n{body.strip()}"


def refresh_study() -> None:
    """Draw the study's picture anew where its runs have changed."""
    study = importlib.import_module("report_study")
    results = read(study.RESULTS)
    if drawn_from(study.FIGURE) != digest(results):
        study.draw(results)
        stamp(study.FIGURE, study.FIGURE, results)
        print(f"drew {study.FIGURE.name}")


def main() -> None:
    """Rewrite all that is made from results."""
    PAGE.write_text(page(), encoding="utf-8")
    refresh_study()
    for name in refresh():
        print(f"drew {name}.png")
    report_rows.main()


if __name__ == "__main__":
    main()
