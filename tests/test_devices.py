"""Runs whose tensors are on two devices: nothing of the one meets the other unasked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_run_on_a_device_is_that_on_the_cpu_and_mixes_nothing(tmp_path):
    """The device computes on the CPU, but refuses tensors that were left there."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "pretend_run.py"), str(tmp_path)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert answer.stdout.splitlines() == [
        "what is apart is refused", "d3s, adapter: the same", "ppo: the same"
    ]  # fmt: skip
