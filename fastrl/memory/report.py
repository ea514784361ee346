"""A plan as a table for a reader, as lines of plain text and as a record for JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fastrl.config import Config
from fastrl.config_io import as_paths
from fastrl.installed import versions_of
from fastrl.memory.plan import PARTS, MemoryPlan, gib

PACKAGES = ("fastrl-llm", "torch", "transformers", "peft", "bitsandbytes")
IN_TENSORS, SLACK, OUTSIDE, NEEDED = "in tensors", "slack", "outside", "needed"


def table(plan: MemoryPlan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: GiB of each part in each phase at its highest moment, then the sums."""
    phases = plan.phases
    parts = [part for part in PARTS if any(phase.parts.get(part) for phase in phases)]
    rows = [(part, *(_cell(phase.parts.get(part, 0)) for phase in phases)) for part in parts]
    rows.append((IN_TENSORS, *(gib(phase.total) for phase in phases)))
    if plan.slack:
        rows.append((SLACK, *(gib(plan.slack) for _ in phases)))
    if plan.outside:
        rows.append((OUTSIDE, *(gib(plan.outside) for _ in phases)))
    if plan.slack or plan.outside:
        beside = plan.slack + plan.outside
        rows.append((NEEDED, *(gib(phase.total + beside) for phase in phases)))
    return ("GiB", *(phase.name for phase in phases)), rows


def _cell(num_bytes: int) -> str:
    return gib(num_bytes) if num_bytes else "-"


def verdict(plan: MemoryPlan, limit: int | None = None, name: str = "the limit") -> list[str]:
    """What sets the peak, what there is and what is left; then what the numbers leave out."""
    largest = max(plan.highest.parts, key=lambda part: plan.highest.parts[part])
    found = [
        f"needs {gib(plan.needed)} GiB: {plan.highest.name} sets the peak, "
        f"{gib(plan.highest.parts[largest])} GiB of it for {largest}"
    ]
    if limit is not None:
        left = limit - plan.needed
        end = f"{gib(left)} are left" if left >= 0 else f"{gib(-left)} too few"
        found.append(f"{name} has {gib(limit)} GiB for a process: {end}")
    return [*found, *plan.notes]


def lines(plan: MemoryPlan, limit: int | None = None) -> list[str]:
    """The table and the verdict as plain text."""
    header, rows = table(plan)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [*(_aligned(row, widths) for row in (header, *rows)), *verdict(plan, limit)]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    return "  ".join([first, *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])


def record(plan: MemoryPlan, config: Config, limit: int | None = None) -> dict[str, Any]:
    """The plan with what it is of and what made it."""
    return {
        **plan.record(),
        "limit_bytes": limit,
        "fits": None if limit is None else plan.needed <= limit,
        "config": as_paths(config),
        "versions": versions_of(PACKAGES),
        "command": " ".join(["fastrl", *sys.argv[1:]]),
    }
