"""Bytes a parameter, measured in processes of their own: all but activations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCALES = 2 * 4 / 256  # of 8-bit moments
GRADIENT = 1 / 16  # one layer's of the model that is measured


def measured(precision: str, optimizer: str, in_backward: str) -> dict[str, float]:
    program = ROOT / "benchmarks" / "optimizer_memory.py"
    result = subprocess.run(
        [sys.executable, str(program), precision, optimizer, in_backward],
        capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("mode", "held", "gradients"),
    [
        ("float32 adamw off", 4 + 8, 4),
        ("float32 adamw two_phase", 4 + 8, 4 * GRADIENT),
        ("split adamw off", 4 + 8, 2),
        ("split adamw_8bit two_phase", 4 + 2 + SCALES, 2 * GRADIENT),
        ("split adamw_8bit previous_norm", 4 + 2 + SCALES, 2 * GRADIENT),
        ("stochastic adamw_8bit two_phase", 2 + 2 + SCALES, 2 * GRADIENT),
    ],
)
def test_a_step_takes_what_is_held_one_gradient_and_little_more(mode, held, gradients):
    """Little: half a byte a parameter, 8 MiB here, of scratch memory and of the allocator."""
    found = measured(*mode.split())
    assert found["held"] == pytest.approx(held, abs=1e-6)
    assert held <= found["peak"] <= held + gradients + 0.6
    if "8bit" in mode:
        assert found["peak"] <= 8  # of full fine-tuning
