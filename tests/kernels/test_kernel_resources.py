"""Every shipped kernel becomes machine code for every architecture, without spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
COMMITTED = ROOT / "benchmarks" / "results" / "aot" / "kernel_resources.json"
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kernel_resources.py", "--json", path],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert path.exists(), result.stderr
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_nothing_spills_and_shared_memory_suffices(rows):
    assert [row for row in rows if not row["fits"]] == []
    for row in rows:
        assert row["spilled_bytes"] == 0
        assert row["shared_bytes"] <= row["shared_limit"]
        assert row["registers"] * row["num_warps"] * 32 <= 65536


def test_every_kernel_of_the_library_is_there(rows):
    """By name: each `*_kernel` function in the sources is compiled in some configuration."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    kernels = {line[4:].split("(")[0] for line in sources.splitlines() if line.startswith("def ")}
    kernels = {name for name in kernels if name.endswith("_kernel")}
    suite = (ROOT / "benchmarks" / "kernel_cases.py").read_text(encoding="utf-8")
    assert kernels
    assert {name for name in kernels if f":{name}" not in suite} == set()
    assert {row["arch"] for row in rows} == ARCHITECTURES


def test_the_committed_table_has_the_same_kernels(rows):
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))["rows"]
    names = {(row["kernel"], row["arch"]) for row in rows}
    assert {(row["kernel"], row["arch"]) for row in committed} == names
