"""The source of every objective is also valid inside a Triton kernel, with the same numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastrl_kernels.objectives import REGULARISERS, SURROGATES

pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAMES = {*SURROGATES, *REGULARISERS}


def run(*words: str, interpreter: bool) -> list[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)]),
        "TRITON_INTERPRET": "1" if interpreter else "0",
    }
    result = subprocess.run(
        [sys.executable, HERE / "objectives_in_triton.py", *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_interpreted_kernels_give_the_numbers_of_torch():
    assert set(run("interpret", interpreter=True)) == {f"same {name}" for name in NAMES}


@pytest.mark.parametrize("arch", ["80", "90", "100", "120"])
def test_every_objective_compiles(arch):
    assert set(run("compile", arch, interpreter=False)) == {f"compiled {name}" for name in NAMES}
