"""Results of benchmarks: one row per case and implementation, as JSON, CSV and a table."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

import torch

OURS = "fastrl"  # the names of our implementations begin so
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "prefix-grouper",
    "flash-attn",
)
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
    tracked_peak_bytes: int | None = None
    """On a CPU the same by the count of torch's allocator; peak_bytes is that of resident pages."""
    beyond_gradients_bytes: int | None = None
    """peak_bytes minus the bytes of the gradients that the call left behind in new memory."""
    floor_ms: float | None = None
    """Median of the bare matrix products (or copies) that nothing can do without, in this run."""
    percent_of_floor: float | None = None
    """100 * floor_ms / p50_ms."""
    tflops: float | None = None
    """Achieved, counting `flops`."""
    gigabytes_per_second: float | None = None
    """Achieved, counting `num_bytes`."""
    copy_gigabytes_per_second: float | None = None
    """Of a plain copy of memory, reads and writes together, in this run."""
    flops: float | None = None
    """Operations that nothing can do without."""
    num_bytes: float | None = None
    """Bytes that have to move: inputs read once, results written once."""
    formulas: str = ""
    """How `flops` and `num_bytes` were counted."""
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
        **({"driver": _driver(), "cuda": str(torch.version.cuda)} if device == "cuda" else {}),
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
        text = json.dumps([asdict(row) for row in rows], indent=1)
        with _whole_file(path) as file:
            file.write(text + "\n")


def write_csv(path: Path | None, rows: Iterable[Row]) -> None:
    """The same as a table of commas, what it was measured on in columns of its own."""
    if path is None:
        return
    rows = list(rows)
    where = list(dict.fromkeys(name for row in rows for name in row.environment))
    names = [field.name for field in fields(Row) if field.name != "environment"]
    with _whole_file(path) as file:
        writer = csv.DictWriter(file, [*names, *where], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow(values.pop("environment") | values)


@contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
    """Appears once it is complete: who is stopped while writing keeps what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        yield file
    partial.replace(path)


def ratio(row: Row, base: Row | None, column: str) -> float | None:
    """row / base; None where either was not measured or is not correct in this very run."""
    if base is None or not (row.correct and base.correct):
        return None
    value, against = getattr(row, column), getattr(base, column)
    return value / against if value is not None and against else None


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
    if rows[0].formulas:
        print(rows[0].formulas)
    if rows[0].copy_gigabytes_per_second is not None:
        print(f"a copy of memory moves {rows[0].copy_gigabytes_per_second:.1f} GB/s in this run")
    width = max(len(row.implementation) for row in rows)
    print(
        f"{'':{width}} {'p50 ms':>9} {'p20':>9} {'p80':>9} {'time x':>9} {'% floor':>8} "
        f"{'peak MiB':>9} {'tracked':>9} {'- grads':>9} {'memory x':>9}  errors of loss, logps, "
        "dX, dW"
    )
    for row in rows:
        print(_line(row, base, width))


def _line(row: Row, base: Row | None, width: int) -> str:
    if row.p50_ms is None:
        return f"{row.implementation:{width}} {row.note}"
    wrong = "" if row.correct else "incorrect"
    time_ratio = _shown(ratio(row, base, "p50_ms")) or wrong
    memory_ratio = _shown(ratio(row, base, "peak_bytes")) or wrong
    errors = (row.loss_error, row.logp_error, row.hidden_grad_error, row.weight_grad_error)
    shown = " ".join("-" if error is None else f"{error:.0e}" for error in errors)
    times = " ".join(f"{value:9.2f}" for value in (row.p50_ms, row.p20_ms, row.p80_ms))
    share = "" if row.percent_of_floor is None else f"{row.percent_of_floor:.0f}"
    counts = (row.peak_bytes, row.tracked_peak_bytes, row.beyond_gradients_bytes)
    memory = " ".join(f"{_mebibytes(count):>9}" for count in counts)
    return (
        f"{row.implementation:{width}} {times} {time_ratio:>9} {share:>8} {memory} "
        f"{memory_ratio:>9}  {shown} {row.note}"
    )


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / MIB:.1f}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    """Version of NVIDIA's driver; "unknown" where nothing tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "unknown"
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return (answer.stdout.split() or ["unknown"])[0]


def _commit() -> str:
    """Short hash, with "-dirty" where tracked files differ; "unknown" where git cannot tell."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    if shutil.which(command[0]) is None:
        return "unknown"
    answer = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()
