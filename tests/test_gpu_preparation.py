"""What a session with a GPU runs, tried without one: every kernel once, tuning, and a real run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # as a script there has it

import gpu_tests
import sanitize
import sanitize_cases

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent

INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
ONCE = (  # together every kernel
    "policy_loss gather fp16", "policy_loss cublas fp32", "linear_logps bf16",
    "segment_attention bf16", "decode_attention bf16", "selected_logps bf16", "token_loss",
    "select_tokens", "adamw split weights, 8 bits",
)  # fmt: skip
REHEARSED = (  # some of the tests at real sizes, at tiny ones; pytest -m gpu there runs them all
    "sizes0-dtype0 or 31_weights or million or truth_is or add_up or selection_run or decode_run"
)
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at forward_kernel+0x70
=========     and Read access at forward_kernel+0x90 [16 hazards]
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\nfine   token_loss\n========= ERROR SUMMARY: 0 errors\n"


def run_script(name: str, *words: str, interpreted: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *words], capture_output=True, text=True,
        env=INTERPRETED if interpreted else {**os.environ, "TRITON_INTERPRET": "0"}, check=False,
    )  # fmt: skip


def kernels_of_the_library() -> set[str]:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    names = {line[4:].split("(")[0] for line in sources.splitlines() if line.startswith("def ")}
    return {name for name in names if name.endswith("_kernel")}


def test_every_kernel_is_launched_once():
    """Declared by the cases, and counted: a case fails where it launches others than it says."""
    by_name = {case.name: case for case in sanitize_cases.CASES}
    assert len(by_name) == len(sanitize_cases.CASES)
    assert set().union(*(by_name[name].kernels for name in ONCE)) == kernels_of_the_library()
    answer = run_script("sanitize.py", "--here", "--only", *ONCE)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"{len(ONCE)} cases, 0 failed" in answer.stdout


def test_sums_of_units_are_added_up_on_a_gpu_too():
    """A GPU shares keys out to more programs than the interpreter; some still leave sums."""
    from fastrl_kernels import make_segments
    from fastrl_kernels.segment_attention.launch import UNITS_PER_PROCESSOR, tilings
    from fastrl_kernels.segment_attention.tiles import Sizes, make_tiles

    tiling = tilings(torch.bfloat16, 36)
    sizes = Sizes(
        window=None, num_groups=2, num_kv_heads=2, query_tile=tiling.forward.queries,
        key_tile=tiling.key_gradients.keys, query_step=tiling.key_gradients.queries,
        num_programs=132 * UNITS_PER_PROCESSOR,
    )  # fmt: skip
    assert make_tiles(make_segments(*sanitize_cases.FOREST), sizes).num_slots > 0


def test_wrong_numbers_and_missing_launches_fail(monkeypatch):
    (case,) = (case for case in sanitize_cases.CASES if case.name == "token_loss")
    right = case.call("torch", **case._inputs("cpu", "cpu"))
    assert case.differences(right) == ""
    wrong = [*right[:-1], right[-1] * 1.001]
    assert case.differences(wrong) == f"result {len(right) - 1} is off by 1.0e-03"
    assert "nan" in case.differences([right[0] * torch.nan, *right[1:]])
    monkeypatch.setattr(type(case), "run", lambda self, device: right)
    outcome = sanitize.attempt(case, "cpu")
    assert not outcome.is_fine
    assert outcome.told == "expected ['token_losses_kernel'], launched "


def test_a_report_of_the_sanitizer_is_read():
    assert sanitize.verdict("memcheck", 0, CLEAN).is_fine
    found = sanitize.verdict("racecheck", sanitize.REPORTED, RACES)
    assert not found.is_fine
    assert found.told.startswith("racecheck: 2 errors; Error: Race reported between Write access")
    silent = sanitize.verdict("memcheck", 1, "Traceback\nImportError: no torch\n")
    assert silent.told == "memcheck reports no summary, status 1: ImportError: no torch"
    wrong = sanitize.verdict("memcheck", 1, CLEAN.replace("fine  ", "failed"))
    assert not wrong.is_fine


def test_the_sanitizer_gets_the_case_and_its_time(tmp_path, monkeypatch):
    """A program that takes the tool's place shows what it was given."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"; sleep $WAIT\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sanitize.find_sanitizer() == str(tool)
    case = sanitize_cases.CASES[0]
    monkeypatch.setenv("WAIT", "0")
    told = sanitize.under_tool(case, "racecheck", str(tool), 30.0).told
    assert "status 0: 1 --tool racecheck --error-exitcode" in told
    assert told.endswith(f"--here --only {case.name}")
    monkeypatch.setenv("WAIT", "30")
    assert sanitize.under_tool(case, "racecheck", str(tool), 0.2).told == "killed after 0 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
def test_what_is_missing_is_one_line():
    for words, line in (
        ([], "sanitize needs a CUDA device, found none; TRITON_INTERPRET=1"),
        (["--tool", "memcheck"], "sanitize needs a CUDA device, found none"),
    ):
        answer = run_script("sanitize.py", *words, interpreted=False)
        assert (answer.returncode, answer.stdout.count("\n")) == (2, 1)
        assert answer.stdout.startswith(line)
    assert "needs compute-sanitizer, found none on PATH" in sanitize.obstacle(
        "memcheck", "cuda", None
    )
    assert sanitize.obstacle("memcheck", "cuda", "/usr/bin/compute-sanitizer") is None


def test_tests_at_real_sizes_are_rehearsed():
    files = [ROOT / name for name in gpu_tests.FIRST if "real_" in name]
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", REHEARSED, *files],
        capture_output=True, text=True, env=INTERPRETED, cwd=ROOT, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert " passed" in answer.stdout
    assert "skipped" not in answer.stdout


def test_every_test_that_needs_a_gpu_is_in_the_list():
    found = gpu_tests.files()
    assert tuple(found[: len(gpu_tests.FIRST)]) == gpu_tests.FIRST
    assert all((ROOT / name).exists() for name in gpu_tests.FIRST)
    assert {"tests/test_hybrids.py", "tests/test_reference.py"} < set(found)
    assert len(set(found)) == len(found)
    assert "tests/test_gpu_preparation.py" not in found
    assert gpu_tests.command(1, ["-k", "some"])[-len(found) - 2 :] == ["-k", "some", *found]
