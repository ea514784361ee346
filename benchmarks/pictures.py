"""Pictures of committed results; one is drawn anew only where its numbers have changed.

P prompt tokens, R completion tokens, G completions of a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from committed import CPU, RESULTS, ROOT, Row, devices, is_measured, is_ours, read, rows_of
from stamps import KEY, digest, drawn_from

FOLDER = ROOT / "docs"
SHARED, PADDED, SINGLE = "fastrl shared prefix", "padded rows", "one row per sequence"
COLORS = {True: "tab:blue", False: "tab:gray"}  # ours or not


class Picture(NamedTuple):
    """data: what is drawn, as plain numbers and strings; None where it is not committed."""

    name: str
    caption: str
    data: Callable[[Path], Any]
    draw: Callable[[Any, Any], None]
    """Onto axes."""


def rows_in(path: Path) -> list[Row]:
    """The measured rows of a file; none where there is no such file or no rows in it."""
    found = rows_of(read(path)) if path.exists() else None
    return [row for row in found or [] if is_measured(row)]


def sizes(case: str) -> dict[str, int]:
    """P, R, G and prompts of a case of bench_shared_prefix.py; no R where lengths differ."""
    return {key: int(value) for key, value in re.findall(r"\b(prompts|P|R|G)=(\d+)", case)}


def speedups(results: Path) -> list[dict[str, Any]] | None:
    """By case: how many times as fast sharing makes an update, and what operations promise."""
    rows = rows_in(results / CPU / "shared_prefix.json")
    found = []
    for case in dict.fromkeys(row["case"] for row in rows if row["case"].startswith("update")):
        of = {row["implementation"]: row for row in rows if row["case"] == case}
        ours, size = of[SHARED], sizes(case)
        operations = {name: of[name]["tflops"] * of[name]["p50_ms"] for name in (SHARED, PADDED)}
        length = f"R = {size['R']}" if "R" in size else "R ragged"
        found.append({
            "label": f"P = {size['P']}\n{length}\nG = {size['G']}",
            "order": [size["P"] * (size["G"] > 1), size["P"]],
            PADDED: of[PADDED]["p50_ms"] / ours["p50_ms"],
            SINGLE: of[SINGLE]["p50_ms"] / ours["p50_ms"],
            "operations": operations[PADDED] / operations[SHARED],
        })  # fmt: skip
    return sorted(found, key=lambda case: case["order"]) or None


def draw_speedups(data: Any, axes: Any) -> None:
    """Bars by case, with a mark at what the operations alone would give."""
    places = range(len(data))
    for offset, (name, color) in enumerate([(PADDED, "tab:blue"), (SINGLE, "tab:cyan")]):
        where = [place + 0.4 * offset - 0.2 for place in places]
        axes.bar(where, [case[name] for case in data], 0.4, color=color, label=f"against {name}")
    marks = [place - 0.2 for place in places]
    promised = [case["operations"] for case in data]
    axes.plot(marks, promised, "k_", markersize=14, label="ratio of operations, padding left out")
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xticks(list(places), [case["label"] for case in data], fontsize=8)
    axes.set(ylabel="times as fast", title="update with shared prompts")
    axes.legend(loc="upper left")


def memories(results: Path) -> list[dict[str, Any]] | None:
    """By case of bench_trainer.py: peak memory of an update in GiB, by trainer."""
    rows = rows_in(results / CPU / "trainer.json")
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        size = sizes(case)
        of = {
            row["implementation"]: row["peak_bytes"] / 2**30
            for row in rows if row["case"] == case and row["peak_bytes"] is not None
        }  # fmt: skip
        label = f"P = {size['P']}, R = {size['R']}, G = {size['G']}"
        found.append({"label": label, "context": size["P"] + size["R"], "gibibytes": of})
    return sorted(found, key=lambda case: case["context"]) or None


def draw_memories(data: Any, axes: Any) -> None:
    """Bars by case."""
    names = list(dict.fromkeys(name for case in data for name in case["gibibytes"]))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        ours = name.startswith("fastrl")
        known = [(i, case["gibibytes"][name]) for i, case in enumerate(data)
                 if name in case["gibibytes"]]  # fmt: skip
        places = [place + (index - (len(names) - 1) / 2) * width for place, _ in known]
        color = ("tab:blue", "tab:cyan", "tab:gray", "lightgray")[index % 4]
        bars = axes.bar(places, [y for _, y in known], width, color=color, label=name,
                        hatch="" if ours else "//")  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(data)), [case["label"] for case in data])
    axes.set(ylabel="GiB beyond weights and states", title="memory of an update")
    axes.legend(fontsize=8)


def frontier(results: Path) -> list[dict[str, Any]] | None:
    """By trainer: the longest context that fits, by budget in MiB."""
    lines: dict[str, list[tuple[int, int]]] = {}
    for row in rows_in(results / CPU / "frontier.json"):
        budget, context = budget_of(row), context_of(row)
        if context is not None:
            lines.setdefault(row["implementation"], []).append((context, budget))
    return [{"name": name, "points": sorted(lines[name])} for name in sorted(lines)] or None


def budget_of(row: Row) -> int:
    """MiB, from the name of the case."""
    found = re.search(r"frontier (\d+) MiB", row["case"])
    if not found:
        raise ValueError(f"{row['case']!r} names no budget as 'frontier N MiB'")
    return int(found[1])


def context_of(row: Row) -> int | None:
    """Tokens, from the note; None where nothing fits."""
    found = re.search(r"context (?:at least )?(\d+) tokens", row["note"])
    return int(found[1]) if found else None


def draw_frontier(data: Any, axes: Any) -> None:
    """Lines from budget to budget."""
    for line in data:
        style = "o-" if line["name"].startswith("fastrl") else "s--"
        axes.plot(*zip(*line["points"], strict=True), style, label=line["name"])
    axes.set(
        xlabel="tokens of the longest context", ylabel="MiB beyond weights and states",
        title="memory against context",
    )  # fmt: skip
    axes.legend(fontsize=8)


def scaling(results: Path) -> list[dict[str, Any]] | None:
    """By size: time and memory of an update, as multiples of those at the smallest."""
    rows = rows_in(results / CPU / "scaling.json")
    axes: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        name, value = re.fullmatch(r"scaling (\w+)=(\d+)", row["case"]).groups()  # type: ignore
        axes.setdefault(name, []).append((int(value), row))
    found = []
    for name, of in axes.items():
        first, base = min(of, key=lambda pair: pair[0])
        line: dict[str, Any] = {"name": name, "sizes": [value / first for value, _ in of]}
        for key, column in (("time", "p50_ms"), ("memory", "peak_bytes")):
            line[key] = [row[column] / base[column] for _, row in of]
        found.append(line)
    return found or None


def draw_scaling(data: Any, axes: Any) -> None:
    """Time in full lines, memory dashed; the thin line is proportional."""
    for index, line in enumerate(data):
        axes.plot(line["sizes"], line["time"], "o-", color=f"C{index}", label=line["name"])
        axes.plot(line["sizes"], line["memory"], "s--", color=f"C{index}", markersize=4)
    most = max(max(line["sizes"]) for line in data)
    axes.plot([1, most], [1, most], color="black", linewidth=0.6)
    axes.set(
        xscale="log", yscale="log", xlabel="times the smallest size",
        ylabel="times that of the smallest", title="an update: time, and memory (dashed)",
    )  # fmt: skip
    axes.legend(fontsize=8)


def learning(results: Path) -> list[dict[str, Any]] | None:
    """By method of headlines.json: mean pass@1 over the seeds, and the samples it took."""
    path = results / CPU / "headlines.json"
    runs = read(path)["learning"] if path.exists() else []
    found = []
    for name in dict.fromkeys(run["learner"] for run in runs):
        curves = [run["points"] for run in runs if run["learner"] == name]
        points = [
            [sum(point[key] for point in at) / len(at) for key in ("samples", "pass_at_1")]
            for at in zip(*curves, strict=False)
        ]
        found.append({"name": name, "points": points})
    return found or None


def draw_learning(data: Any, axes: Any) -> None:
    """A line for each method."""
    for index, line in enumerate(data):
        style = "-" if index < 10 else "--"
        axes.plot(*zip(*line["points"], strict=True), style, label=line["name"], linewidth=1.2)
    axes.set(xlabel="samples", ylabel="held-out pass@1", title="the demo task, mean over seeds")
    axes.legend(fontsize=7)


def roofs(folder: str) -> Callable[[Path], dict[str, Any] | None]:
    """Of one machine: rates of copying and of bare products, and what was reached below them."""

    def collect(results: Path) -> dict[str, Any] | None:
        points, products, copies = [], [], []
        for path in sorted((results / folder).glob("*.json")):
            for row in rows_in(path):
                copies.append(row.get("copy_gigabytes_per_second") or 0.0)
                if not row.get("flops") or not row.get("num_bytes"):
                    continue
                if row["implementation"].startswith("bare"):
                    products.append(row["tflops"])
                    continue
                if row.get("percent_of_floor") == 100:  # a floor of another kind
                    continue
                points.append({
                    "name": row["case"].split()[0], "ours": is_ours(row),
                    "intensity": row["flops"] / row["num_bytes"], "tflops": row["tflops"],
                })  # fmt: skip
        if not points or not products or not max(copies):
            return None
        return {"points": points, "tflops": max(products), "copy": max(copies)}

    return collect


def draw_roofs(data: Any, axes: Any) -> None:
    """Rates over operations a byte; the ceilings are those measured beside the cases."""
    intensities = [point["intensity"] for point in data["points"]]
    ridge = 1000 * data["tflops"] / data["copy"]
    ends = [min([ridge, *intensities]) / 3, ridge, max([ridge, *intensities]) * 3]
    roof = [min(x * data["copy"] / 1000, data["tflops"]) for x in ends]
    axes.plot(ends, roof, color="black", label="copying, and bare products of matrices")
    markers = dict(zip(sorted({p["name"] for p in data["points"]}), "osDv^<>P*Xhd", strict=False))
    for name, marker in markers.items():
        for ours in (False, True):
            chosen = [p for p in data["points"] if p["name"] == name and p["ours"] == ours]
            if chosen:
                xs, ys = [p["intensity"] for p in chosen], [p["tflops"] for p in chosen]
                label = f"{name}, {'FastRL' if ours else 'peers'}"
                axes.plot(xs, ys, marker, color=COLORS[ours], label=label, linestyle="none")
    axes.set(
        xscale="log", yscale="log", xlabel="operations a byte that has to move",
        ylabel="TFLOP/s", title="operations that are needed, over the time taken",
    )  # fmt: skip
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def pictures(results: Path = RESULTS) -> list[Picture]:
    """All that are known, those without results included."""
    found = [
        Picture("speedup_by_prefix", "How much faster an update gets where prompts are shared; "
                "the first two cases share nothing", speedups, draw_speedups),
        Picture("memory_by_context", "Peak memory of an update", memories, draw_memories),
        Picture("frontier", "The longest context in a budget of memory", frontier, draw_frontier),
        Picture("scaling", "Time and memory of an update as sizes grow", scaling, draw_scaling),
        Picture("headlines", "pass@1 over samples, by method", learning, draw_learning),
    ]  # fmt: skip
    for folder in (CPU, *devices(results)):
        name = "roofline" if folder == CPU else f"roofline_{folder}"
        caption = f"Roofline, {folder}: rates reached below those of copying and of bare products"
        found.append(Picture(name, caption, roofs(folder), draw_roofs))
    return found


def draw(picture: Picture, data: Any, folder: Path = FOLDER) -> None:
    """Write the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    picture.draw(data, axes)
    axes.grid(alpha=0.3)
    metadata = {KEY: digest(data), "Software": None}
    figure.savefig(folder / f"{picture.name}.png", dpi=120, metadata=metadata)
    pyplot.close(figure)


def refresh(folder: Path = FOLDER, results: Path = RESULTS) -> list[str]:
    """Draw what has changed; names of what was drawn."""
    drawn = []
    for picture in pictures(results):
        data = picture.data(results)
        if data and drawn_from(folder / f"{picture.name}.png") != digest(data):
            draw(picture, data, folder)
            drawn.append(picture.name)
    return drawn
