"""What was found out about each technique, with the ratios that its check allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.bench.estimates import Estimate
from fastrl.bench.techniques import Technique

GIB = 2**30


@dataclass
class Row:
    """One technique; None where it was not measured, and then `note` says why."""

    technique: Technique
    estimate: Estimate
    is_correct: bool | None = None
    """Whether loss and gradients are those of the first technique that ran, in this run."""
    loss_error: float | None = None
    gradient_error: float | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    tokens_per_second: float | None = None
    """Of completions, whatever of them is trained."""
    percent_of_floor: float | None = None
    peak_bytes: int | None = None
    """Beyond weights and gradients."""
    note: str = ""

    @property
    def total_bytes(self) -> int | None:
        """With weights, gradients and the moments of float32 AdamW."""
        if self.peak_bytes is None:
            return None
        return self.peak_bytes + self.estimate.total - self.estimate.activations

    def as_record(self) -> dict[str, object]:
        """For JSON."""
        found = {
            "technique": self.technique.name.lstrip("+ ").strip(),
            "settings": self.technique.settings,
            "estimated_bytes": self.estimate.total,
            "total_bytes": self.total_bytes,
        }
        names = [field.name for field in dataclasses.fields(self)]
        rest = {
            name: getattr(self, name) for name in names if name not in ("technique", "estimate")
        }
        return {**found, **rest}


HEADER = (
    "technique", "tokens/s", "x first", "x before", "% of floor", "peak GiB", "with states",
    "ms p50 [p20, p80]", "error of loss, gradients",
)  # fmt: skip


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each row; no ratio to or from what is not correct."""
    measured = [row for row in rows if row.is_correct and row.p50_ms is not None]
    first = measured[0] if measured else None
    return [_line(row, first, _before(rows, index)) for index, row in enumerate(rows)]


def notes(rows: Sequence[Row]) -> list[str]:
    """One line for what was left out, and why."""
    return [f"{row.technique.name.strip()}: {row.note}" for row in rows if row.note]


def _before(rows: Sequence[Row], index: int) -> Row | None:
    """What a technique was added to: the one above; of memory modes, the last without any."""
    above = rows[:index]
    if rows[index].technique.settings:
        above = [row for row in above if not row.technique.settings]
    return above[-1] if above else None


def _line(row: Row, first: Row | None, before: Row | None) -> tuple[str, ...]:
    if row.p50_ms is None:
        return (
            row.technique.name,
            *["-"] * 4,
            _gib(row.peak_bytes),
            _gib(row.total_bytes),
            "-",
            "-",
        )
    assert row.tokens_per_second is not None
    times = f"{row.p50_ms:.1f} [{row.p20_ms:.1f}, {row.p80_ms:.1f}]"
    share = "-" if row.percent_of_floor is None else f"{row.percent_of_floor:.0f}"
    return (
        row.technique.name, f"{row.tokens_per_second:.0f}", _ratio(row, first), _ratio(row, before),
        share, _gib(row.peak_bytes), _gib(row.total_bytes), times,
        f"{row.loss_error:.0e}, {row.gradient_error:.0e}",
    )  # fmt: skip


def _ratio(row: Row, other: Row | None) -> str:
    if not row.is_correct:
        return "incorrect"
    if other is None or other is row or not other.is_correct:
        return "-"
    if row.p50_ms is None or other.p50_ms is None:
        return "-"
    return f"{other.p50_ms / row.p50_ms:.2f}"


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.3f}"
