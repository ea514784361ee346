"""At S=2048, V=65536, D=256 the naive path takes a gigabyte; ours its workspace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORKSPACE = 256 * 2**20  # the default


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
@pytest.mark.parametrize("case", ["one_pass", "min_memory", "linear_logps"])
def test_peak_is_the_workspace_and_the_gradients(case):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent / "kernels")}
    result = subprocess.run(
        [sys.executable, HERE / "peak_memory.py", case],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 1.1 * WORKSPACE
