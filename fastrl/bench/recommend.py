"""Settings of a run, picked from what was measured, with the reason for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastrl.bench.models import Blueprint
from fastrl.bench.request import Request
from fastrl.bench.rows import Row
from fastrl.memory.plan import gib
from fastrl.precision import frozen_dtype

WORTH = 1.05
"""A setting has to save more than this, in time, to be picked for its time alone."""


class Mode(NamedTuple):
    """A way to keep weights, gradients and moments; bytes a trained parameter at the peak."""

    precision: str
    optimizer: str
    in_backward: str
    num_bytes: float
    remark: str

    def of(self, blueprint: Blueprint) -> float:
        """Bytes of a whole model, weights below an adapter included."""
        frozen = blueprint.num_parameters - blueprint.num_trained
        return (
            self.num_bytes * blueprint.num_trained + frozen * frozen_dtype(self.precision).itemsize
        )


MODES = (
    Mode("float32", "adamw", "off", 16, "the reference"),
    Mode("split", "adamw", "off", 14, "bfloat16 layers over exact float32 weights"),
    Mode("float32", "adamw_8bit", "off", 10.03, "moments in 8 bits"),
    Mode("split", "adamw_8bit", "off", 8.03, "both"),
    Mode("split", "adamw_8bit", "previous_norm", 6.03, "and no gradient outlives its step"),
    Mode("stochastic", "adamw_8bit", "previous_norm", 4.03, "bfloat16 weights rounded by chance"),
)
"""docs/memory.md measures them; what they take of time depends on the GPU."""


MODE_HEADER = (
    "precision", "optimizer", "in_backward", "bytes a parameter", "GiB of this model", "what it is",
)  # fmt: skip


class Setting(NamedTuple):
    """One line of a config."""

    table: str
    key: str
    value: Any
    reason: str


class Recommendation(NamedTuple):
    """Tables of a config with a reason for every line."""

    toml: str
    reasons: list[str]
    fits: bool


def mode_rows(blueprint: Blueprint) -> list[tuple[str, ...]]:
    """A line for each mode: what it is and what it takes of this model."""
    return [
        (
            mode.precision, mode.optimizer, mode.in_backward, f"{mode.num_bytes:g}",
            gib(mode.of(blueprint)), mode.remark,
        )
        for mode in MODES
    ]  # fmt: skip


def recommend(
    request: Request, blueprint: Blueprint, rows: Sequence[Row], max_tokens_per_pass: int
) -> Recommendation | None:
    """The fastest technique within the limit, with the mode that changes least; None where nothing
    that can be trained was measured.
    """
    found = [row for row in rows if _can_be_picked(row, request.memory_limit)]
    found.sort(key=lambda row: (row.p50_ms or 0.0) * (WORTH if row.technique.settings else 1.0))
    if not found:
        return None
    modes = _modes(request)
    row, mode, fits = found[0], modes[0], True
    if request.memory_limit is not None:
        fitting = [
            (row, mode)
            for mode in modes
            for row in found
            if needed(row, mode, blueprint) <= request.memory_limit
        ]
        fits = bool(fitting)
        least = min(found, key=lambda row: row.peak_bytes or 0)
        row, mode = fitting[0] if fits else (least, modes[-1])
    settings = _settings(request, blueprint, row, found, mode, max_tokens_per_pass)
    return Recommendation(_toml(settings), _reasons(settings), fits)


def needed(row: Row, mode: Mode, blueprint: Blueprint) -> float:
    """Bytes of a run: weights, gradients and moments in that mode, and the measured peak beside."""
    return mode.of(blueprint) + (row.peak_bytes or 0)


def _can_be_picked(row: Row, memory_limit: float | None) -> bool:
    has_memory = row.peak_bytes is not None or memory_limit is None
    return bool(row.is_correct and row.technique.is_trainable and row.p50_ms) and has_memory


def _modes(request: Request) -> list[Mode]:
    """The present way first, then those that take less; a given precision stays."""
    precision, optim = request.config.model.precision, request.config.optim
    same = [m for m in MODES if (m.precision, m.optimizer) == (precision, optim.optimizer)]
    here = [m for m in same if m.in_backward == optim.in_backward]
    weights = {"float32": 8.0, "autocast": 8.0, "split": 6.0, "stochastic": 4.0}[precision]
    first = here[0] if here else Mode(
        precision, optim.optimizer, optim.in_backward, weights + 8.0, "as configured"
    )  # fmt: skip
    is_free = "model.precision" in request.chooses
    less = [m for m in MODES if m.num_bytes < first.num_bytes]
    return [first, *(m for m in less if is_free or m.precision == precision)]


def _settings(
    request: Request, blueprint: Blueprint, row: Row, found: Sequence[Row], mode: Mode,
    max_tokens_per_pass: int,
) -> list[Setting]:  # fmt: skip
    rollout, limit = request.config.rollout, request.memory_limit
    settings = [
        Setting("", "max_tokens_per_pass", max_tokens_per_pass, "what was measured"),
        Setting("rollout", "num_generations", rollout.num_generations, "as asked"),
        Setting("rollout", "max_prompt_length", rollout.max_prompt_length, "as asked"),
        Setting("rollout", "max_completion_length", rollout.max_completion_length, "as asked"),
    ]
    if request.directory is not None:
        settings.append(Setting("model", "path", str(request.directory), "the model"))
    if request.config.model.lora:
        settings.append(Setting("model", "lora", request.config.model.lora, "as configured"))
    total = needed(row, mode, blueprint)
    fit = f"{gib(total)} GiB in all" + ("" if limit is None else f" of {gib(limit)} allowed")
    settings.append(Setting("model", "precision", mode.precision, f"{mode.remark}; {fit}"))
    used = row.technique.settings
    for key, off in (("gradient_checkpointing", False), ("activation_offloading", False),
                     ("mlp_chunk_size", 0)):  # fmt: skip
        settings.append(Setting("model", key, used.get(key, off), _why(key, row, found)))
    settings.append(
        Setting("optim", "optimizer", mode.optimizer,
                f"{mode.num_bytes:g} bytes a trained parameter with weights and gradients")
    )  # fmt: skip
    settings.append(Setting("optim", "in_backward", mode.in_backward, "counted in these bytes"))
    return settings


def _why(key: str, picked: Row, found: Sequence[Row]) -> str:
    """The fastest row with the setting against the fastest without it."""
    sides = {
        is_on: [row for row in found if (key in row.technique.settings) is is_on]
        for is_on in (True, False)
    }
    if not sides[True] or not sides[False]:
        return "not measured here"
    on, off = sides[True][0], sides[False][0]
    assert on.p50_ms is not None
    assert off.p50_ms is not None
    told = f"{on.p50_ms / off.p50_ms:.2f} of the time"
    if on.peak_bytes is not None and off.peak_bytes is not None:
        told += f", {gib(on.peak_bytes)} instead of {gib(off.peak_bytes)} GiB of activations"
    if key in picked.technique.settings:
        return f"on: {told}"
    return f"off: it would take {told}"


def _toml(settings: Sequence[Setting]) -> str:
    import tomli_w

    tables: dict[str, Any] = {}
    for setting in settings:
        target = tables.setdefault(setting.table, {}) if setting.table else tables
        target[setting.key] = setting.value
    return tomli_w.dumps(tables)


def _reasons(settings: Sequence[Setting]) -> list[str]:
    return [
        f"{setting.table + '.' if setting.table else ''}{setting.key} = {setting.value}: "
        f"{setting.reason}"
        for setting in settings
    ]
