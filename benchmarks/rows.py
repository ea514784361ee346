"""Results of benchmarks: one row per case and implementation, as JSON and as a table."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

OURS = "fastrl"  # the names of our implementations begin so
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One implementation in one case; None where it was not measured or does not apply."""

    case: str
    implementation: str
    correct: bool
    """Whether the outputs and gradients of this very run agree with the float64 reference."""
    environment: dict[str, str]
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    peak_bytes: int | None = None
    """Beyond the inputs; see measure.py."""
    beyond_gradients_bytes: int | None = None
    """peak_bytes minus the bytes of the gradients that the call left behind in new memory."""
    floor_ms: float | None = None
    """Median of the bare matrix products (or copies) that nothing can do without, in this run."""
    percent_of_floor: float | None = None
    """100 * floor_ms / p50_ms."""
    tflops: float | None = None
    """Achieved, counting the operations of the floor."""
    gigabytes_per_second: float | None = None
    """Achieved, counting the bytes of the floor."""
    loss_error: float | None = None
    logp_error: float | None = None
    hidden_grad_error: float | None = None
    weight_grad_error: float | None = None
    note: str = ""
    """Why there is no time, or no memory."""


def environment(device: str) -> dict[str, str]:
    """What the numbers depend on besides the code of the case."""
    versions = {name: _version(name) for name in PACKAGES}
    hardware = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "device": hardware,
        "cpu": _cpu_name(),
        "num_threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def write_json(path: Path | None, rows: Iterable[Row]) -> None:
    """All rows so far, in one list; nothing where there is no path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(row) for row in rows], indent=1)
        path.write_text(text + "\n", encoding="utf-8")


def print_table(rows: list[Row]) -> None:
    """The rows of one case; ratios to our first row, and none for what is not correct."""
    ours = [row for row in rows if row.implementation.startswith(OURS) and row.correct]
    base = ours[0] if ours else None
    told = (
        f"time x and memory x: relative to {base.implementation}"
        if base
        else (f"no ratios: no correct {OURS} row in this run")
    )
    print(f"\n{rows[0].case}\n{told}")
    width = max(len(row.implementation) for row in rows)
    print(
        f"{'':{width}} {'p50 ms':>9} {'p20':>9} {'p80':>9} {'time x':>9} {'% floor':>8} "
        f"{'peak MiB':>9} {'- grads':>9} {'memory x':>9}  errors of loss, logps, dX, dW"
    )
    for row in rows:
        print(_line(row, base, width))


def _line(row: Row, base: Row | None, width: int) -> str:
    if row.p50_ms is None:
        return f"{row.implementation:{width}} {row.note}"
    time_ratio = memory_ratio = "" if row.correct else "incorrect"
    if row.correct and base is not None:
        time_ratio = _ratio(row.p50_ms, base.p50_ms)
        memory_ratio = _ratio(row.peak_bytes, base.peak_bytes)
    errors = (row.loss_error, row.logp_error, row.hidden_grad_error, row.weight_grad_error)
    shown = " ".join("-" if error is None else f"{error:.0e}" for error in errors)
    times = " ".join(f"{value:9.2f}" for value in (row.p50_ms, row.p20_ms, row.p80_ms))
    share = "" if row.percent_of_floor is None else f"{row.percent_of_floor:.0f}"
    return (
        f"{row.implementation:{width}} {times} {time_ratio:>9} {share:>8} "
        f"{_mebibytes(row.peak_bytes):>9} {_mebibytes(row.beyond_gradients_bytes):>9} "
        f"{memory_ratio:>9}  {shown} {row.note}"
    )


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else ""


def _mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / MIB:.1f}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Short hash, with "-dirty" where tracked files differ; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    answer = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()
