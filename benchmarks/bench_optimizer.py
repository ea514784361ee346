"""One step of AdamW by ways to keep weights and moments: time, and bytes a parameter.

python benchmarks/bench_optimizer.py [--quick] [--json PATH] [--device cpu|cuda]

Time: a step over given gradients, of 16 matrices. Memory: benchmarks/optimizer_memory.py in a
process of its own; peak_bytes is the most in use during a step, weights and gradients included.
bitsandbytes and torchao take part where they are installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import Timing, time_interleaved
from rows import Row, environment, write_json
from torch import Tensor, nn

from fastrl.config import OptimConfig
from fastrl.optim import make_optimizer, parameter_groups
from fastrl.optim.make import LIBRARIES, MOMENTS

HALF = ("split", "stochastic")
PRECISIONS = ("float32", *HALF)
IN_BACKWARD = ("off", "two_phase", "previous_norm")
NUM_MATRICES = 16


def new_parameters(width: int, precision: str, device: str) -> nn.Module:
    """Matrices with gradients, the same for each precision up to its rounding."""
    # Where they stay: a CPU would take longer for them than the whole case may.
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if precision in HALF else torch.float32
    layers = nn.ModuleList()
    for _ in range(NUM_MATRICES):
        layer = nn.Linear(width, width, bias=False, dtype=dtype, device=device)
        values = torch.randn(2, width, width, generator=generator, device=device).bfloat16()
        with torch.no_grad():
            layer.weight.copy_(values[0])
        layer.weight.grad = values[1].to(dtype)
        layers.append(layer)
    return layers


def masters(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """The float32 value of a weight."""
    from fastrl.optim import join

    remainders = optimizer.state[parameter].get("remainders")
    if remainders is None:
        return parameter.detach().float()
    return join(parameter.detach().view(-1), remainders).view(parameter.shape)


def implementations(device: str) -> dict[str, tuple[str, str]]:
    """Names of rows -> precision and optimizer; those of torch are None of ours."""
    found = {
        f"fastrl {name}, {precision}": (precision, name)
        for name in MOMENTS for precision in PRECISIONS
    }  # fmt: skip
    found |= {"torch foreach": ("float32", "foreach"), "torch fused": ("float32", "fused")}
    for name, library in LIBRARIES.items():
        is_possible = device == "cuda" or not library.needs_gpu
        if find_spec(library.package) is not None and is_possible:
            found[name] = ("float32", name)
    return found


def new_optimizer(name: str, precision: str, module: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(module, learning_rate=1e-3, weight_decay=0.1)
    if name in ("foreach", "fused"):
        return torch.optim.AdamW(groups, **{name: True})
    config = OptimConfig(optimizer=name, learning_rate=1e-3)
    return make_optimizer(groups, config, precision=precision, seed=0)


def is_correct(optimizer: torch.optim.Optimizer, module: nn.Module, before: Tensor) -> bool:
    """The first step against the formula in float64: within what its way to keep weights rounds.

    In the first step both moments are in the proportion of the gradient to its square, so the
    step is lr times the sign, whatever the moments are rounded to, within their 9 % (4 bits: 30 %).
    """
    parameter = next(module.parameters())
    gradient = parameter.grad.double()
    step = 1e-3 * gradient / (gradient.abs() + 1e-8)
    expected = before.double() * (1 - 1e-3 * 0.1) - step
    found = masters(optimizer, parameter).double()
    allowed = 0.3 * 1e-3 + 2e-7 * expected.abs()
    if parameter.dtype == torch.bfloat16 and "remainders" not in optimizer.state[parameter]:
        allowed = allowed + 2.0**-7 * expected.abs()
    return bool(((found - expected).abs() <= allowed).all())


def memory(precision: str, optimizer: str, in_backward: str, device: str) -> dict[str, float]:
    """Bytes a parameter of one mode, from a process of its own."""
    program = Path(__file__).parent / "optimizer_memory.py"
    command = [sys.executable, "-W", "ignore", program, precision, optimizer, in_backward]
    result = subprocess.run(
        [*command, "--device", device], capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def time_rows(case: str, width: int, device: str, seconds: float) -> list[Row]:
    """One row for each way to keep things."""
    steps, correct, missing = {}, {}, {}
    for name, (precision, kind) in implementations(device).items():
        module = new_parameters(width, precision, device)
        before = next(module.parameters()).detach().clone()
        try:
            optimizer = new_optimizer(kind, precision, module)
        except ImportError as error:  # the package is there, its optimizer is not
            missing[name] = f"absent: {error}"
            continue
        optimizer.step()
        correct[name] = is_correct(optimizer, module, before)
        steps[name] = optimizer.step
    times: dict[str, Timing] = time_interleaved(steps, device=device, seconds=seconds)
    return [
        Row(
            case=case, implementation=name, correct=correct[name], environment=environment(device),
            p20_ms=timing.p20, p50_ms=timing.p50, p80_ms=timing.p80,
        )
        for name, timing in times.items()
    ] + [
        Row(case, name, correct=False, environment=environment(device), note=reason)
        for name, reason in missing.items()
    ]  # fmt: skip


def memory_rows(case: str, device: str, quick: bool) -> list[Row]:
    """One row for each way to keep things and to step."""
    names = [*MOMENTS, *{kind for _, kind in implementations(device).values() if kind in LIBRARIES}]
    rows = []
    for kind in names:
        ours = kind in MOMENTS
        for precision in PRECISIONS if ours else ("float32",):
            for in_backward in IN_BACKWARD[: 1 if quick or not ours else 3]:
                rows.append(memory_row(case, precision, kind, in_backward, device))
    return rows


def memory_row(case: str, precision: str, kind: str, in_backward: str, device: str) -> Row:
    """Bytes of one way to keep things and to step."""
    name = f"{kind}, {precision}, in_backward {in_backward}"
    try:
        found = memory(precision, kind, in_backward, device)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.splitlines() or [""])[-1]
        return Row(case, name, correct=False, environment=environment(device), note=reason)
    return Row(
        case=case, implementation=name, correct=True, environment=environment(device),
        peak_bytes=round(found["peak"] * 2**24),
        note=f"a parameter: held {found['held']:.2f}, on the CPU {found['held_on_cpu']:.2f}, "
        f"peak {found['peak']:.2f}",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    width = 256 if given.quick else 512 if given.device == "cpu" else 4096
    count = NUM_MATRICES * width**2 / 1e6
    rows = time_rows(f"step of {count:.0f}M parameters", width, given.device, 60)
    for row in rows:
        if row.p50_ms is None:
            print(f"{row.implementation:32} {row.note}")
            continue
        per_parameter = 1e6 * row.p50_ms / (NUM_MATRICES * width**2)
        print(
            f"{row.implementation:32} {row.p50_ms:9.2f} ms ({row.p20_ms:.2f} to {row.p80_ms:.2f}), "
            f"{per_parameter:.2f} ns a parameter{'' if row.correct else ', incorrect'}"
        )
    timed = len(rows)
    rows += memory_rows("bytes of a step, 16.8M parameters", given.device, given.quick)
    for row in rows[timed:]:
        print(f"{row.implementation:56} {row.note}")
    write_json(given.json, rows)
    return 0 if all(row.correct or row.note for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
