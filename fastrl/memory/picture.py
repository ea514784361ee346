"""A plan as a picture: a bar for each phase, with a line at what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrl.memory.plan import GIB, PARTS, MemoryPlan

SLACK, OUTSIDE = "allocator's slack", "outside of tensors"
COLORS = {
    "weights": "tab:blue", "adapter": "tab:cyan", "gradients": "tab:orange",
    "optimizer": "tab:purple", "reference": "tab:olive", "value model": "tab:brown",
    "keys and values": "tab:green", "activations": "tab:red", "head": "tab:pink",
    "attention": "gold", "sampling": "yellowgreen", "other": "silver",
    SLACK: "lightgray", OUTSIDE: "gray",
}  # fmt: skip


def draw(plan: MemoryPlan, path: Path, *, title: str, limit: int | None, name: str) -> None:
    """Write a PNG. limit: bytes that there are, of what is called `name`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    draw_bars(plan, axes, limit=limit, name=name)
    axes.set_title(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_bars(plan: MemoryPlan, axes: Any, *, limit: int | None, name: str) -> None:
    """Stacked bars onto axes, bottom to top in the order of the table."""
    phases = [phase.name for phase in plan.phases]
    bottoms = [0.0] * len(phases)
    for part, heights in bars(plan).items():
        if any(heights):
            axes.bar(phases, heights, 0.6, bottom=bottoms, color=COLORS[part], label=part)
            bottoms = [x + y for x, y in zip(bottoms, heights, strict=True)]
    for place, height in enumerate(bottoms):
        axes.text(place, height, f"{height:.3g}", ha="center", va="bottom", fontsize=9)
    if limit is not None:
        label = f"{name}: {limit / GIB:.3g}"
        axes.axhline(limit / GIB, color="black", linestyle="--", linewidth=1, label=label)
    axes.set(ylabel="GiB", ylim=(0, 1.12 * max(*bottoms, 0.0 if limit is None else limit / GIB)))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def bars(plan: MemoryPlan) -> dict[str, list[float]]:
    """GiB of each part, by phase; what lies beside the tensors last."""
    found = {part: [phase.parts.get(part, 0) / GIB for phase in plan.phases] for part in PARTS}
    beside = {SLACK: plan.slack, OUTSIDE: plan.outside}
    return {**found, **{part: [size / GIB] * len(plan.phases) for part, size in beside.items()}}
