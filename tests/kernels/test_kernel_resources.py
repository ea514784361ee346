"""Every shipped kernel becomes machine code for every architecture, without spills in a loop."""

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
sys.path.insert(0, str(ROOT / "benchmarks"))  # as a script there has it
ASSEMBLY = """
        /*0000*/                   STL [R1], R2 ;
.L_x_2:
        /*0010*/                   LDL R3, [R1+0x4] ;
.L_x_1:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/              @P1 BRA `(.L_x_2) ;
        /*0050*/                   EXIT ;
"""


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
        assert row["spills_in_loops"] == 0
        assert row["spilled_bytes"] <= 128
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


def test_spills_in_the_innermost_loop_are_counted():
    """What is kept outside, or in a loop around the products, is fetched once for a tile."""
    import kernel_resources

    assert kernel_resources.spills_of(ASSEMBLY) == 0
    inside = ASSEMBLY.replace("HGMMA", "STL [R1+0x8], R4 ;\n        /*0028*/  HGMMA")
    assert kernel_resources.spills_of(inside) == 1


def test_each_architecture_gets_the_tiles_of_its_launches(monkeypatch):
    """What kernel_resources compiles for a capability is what a GPU of that capability launches."""
    import kernel_resources
    import torch

    from fastrl_kernels.launch import HALF_TILES, column_of, head_tiles

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arch, expected in ((80, "small"), (86, "small"), (90, "large"), (100, "small")):
        properties = type("Properties", (), {"major": arch // 10, "minor": arch % 10})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        column_of.cache_clear()
        assert column_of(device) == kernel_resources.column(arch) == expected
        assert head_tiles(torch.bfloat16, device) == HALF_TILES[expected]
    column_of.cache_clear()
