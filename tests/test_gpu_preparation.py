"""What a session with a GPU runs, tried without one: every kernel once, tuning, and a real run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # as a script there has it

import gpu_tests
import real_run_cases
import sanitize
import sanitize_cases
import tune
import tune_cases
import tune_resources
import tune_settings
from rows import Row, write_json

from fastrl.bench.measuring import Timing

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent

INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
ONCE = (  # together every kernel
    "policy_loss gather fp16", "policy_loss cublas fp32", "linear_logps bf16",
    "segment_attention bf16", "decode_attention bf16", "selected_logps bf16", "token_loss",
    "select_tokens", "adamw split weights, 8 bits",
)  # fmt: skip
REHEARSED = (  # some of the tests at real sizes, at tiny ones; pytest -m gpu there runs them all
    "sizes0-bfloat16-engine0 or 31_weights or million or truth_is or add_up or selection_run "
    "or decode_run or last_rows or over_4_bits"
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

    tiling = tilings(torch.bfloat16, 36, torch.device("cuda"))
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
    answer = run_script("sanitize.py", "--tool", "memcheck", interpreted=False)
    assert (answer.returncode, answer.stdout.count("\n")) == (2, 1)
    assert answer.stdout.startswith("sanitize needs a CUDA device, found none; TRITON_INTERPRET=1")
    assert "needs compute-sanitizer, found none on PATH" in sanitize.obstacle(
        "memcheck", "cuda", None
    )
    assert sanitize.obstacle("memcheck", "cuda", "/usr/bin/compute-sanitizer") is None


def test_tests_at_real_sizes_are_rehearsed():
    files = [ROOT / name for name in gpu_tests.FIRST if "real_" in name or "nf4" in name]
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
    assert gpu_tests.command(["-k", "some"], found)[-len(found) - 2 :] == ["-k", "some", *found]


TILE = "fastrl_kernels.segment_attention.launch:HALF_TILINGS.large.128.key_gradients"


def test_settings_are_other_ones_for_a_while():
    from fastrl_kernels.segment_attention.launch import tilings as tilings_of

    def tilings() -> Any:
        return tilings_of(torch.bfloat16, 128, torch.device("cpu"))

    before = tilings()
    other = before.key_gradients._replace(keys=64)
    stack = contextlib.ExitStack()
    stack.enter_context(tune_settings.overridden({TILE: other}))
    assert tilings() == before._replace(key_gradients=other)
    stack.__exit__(ValueError, ValueError(), None)  # as a candidate leaves it that does not compile
    assert tilings() == before
    with pytest.raises(KeyError, match="expected one of"):
        tune_settings.replaced({64: 1}, ["96"], 2)


def test_every_candidate_is_new_and_fits():
    names = [task.name for task in tune_cases.tasks(False)]
    assert len(set(names)) == len(names)
    for task in tune_cases.tasks(False):
        candidates = task.candidates()
        assert 1 <= len(candidates) <= 18, task.name
        for settings in candidates.values():
            for path, value in settings.items():
                assert value != tune_settings.current(path), path
    (products,) = (x for x in tune_cases.tasks(False) if x.name == "tiles of weight gradients")
    tiles = [next(iter(x.values())) for x in products.candidates().values()]
    assert all(tune_cases.fits_product(tile) for tile in tiles)
    small = tune_settings.current("fastrl_kernels.launch:HALF_TILES.small.weight_gradients")
    assert small in tiles  # what was there before it is timed beside today's
    assert not tune_cases.fits_product(small._replace(depth=128, num_stages=8))


def test_only_what_is_beyond_the_noise_is_proposed():
    new = tune_settings.current(TILE)._replace(keys=64)
    candidates = {tune.TODAY: {}, "new": {TILE: new}}
    times = {
        tune.TODAY: Timing(9.0, 10.0, 11.0), tune.AGAIN: Timing(9.5, 10.5, 11.0),
        "new": Timing(7.0, 8.0, 8.9),
    }  # fmt: skip
    first, second = tune.proposal(candidates, times).splitlines()
    assert first == "proposal: new: 10 -> 8 ms (-20.0%), p80 8.9 below today's p20 9"
    assert second.strip().startswith(f"{TILE} = {new!r}  # today Tile(")
    noisy = {**times, "new": Timing(7.0, 8.0, 9.0)}
    assert tune.proposal(candidates, noisy).startswith("no proposal: the best, new, is within")
    assert tune.proposal(candidates, {}) == "no proposal: today's settings were not timed"


def test_tasks_far_from_the_floor_come_first(tmp_path):
    found = tune_cases.tasks(False)
    last = found[-1]
    rows = [
        Row(f"{last.case} [selection]", last.implementation, True, {}, percent_of_floor=9.0),
        Row(f"{found[0].case} [all]", found[0].implementation, True, {}, percent_of_floor=80.0),
    ]
    path = tmp_path / "suite.json"
    write_json(path, rows)
    ordered = [task.name for task in tune.by_distance(found, path)]
    assert ordered[0] == last.name
    assert ordered[-2:] == ["tiles of logits", "rows of a forward chunk"]  # of the same case
    assert tune.by_distance(found, None) == found


def test_a_task_from_beginning_to_end(tmp_path):
    path = tmp_path / "rows.json"
    answer = run_script(
        "tune.py", "--tiny", "--only", "tiles of decoding", "--task-seconds", "2", "--json",
        str(path),
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    rows = [Row(**found) for found in json.loads(path.read_text(encoding="utf-8"))]
    names = [row.implementation for row in rows]
    assert names[0] == tune.TODAY
    assert tune.AGAIN in names
    assert all(row.correct and row.hidden_grad_error > 0 for row in rows)
    assert all(row.p50_ms > 0 for row in rows if row.note != "not timed")
    assert "proposal" in answer.stdout


def test_operations_of_an_update():
    """Against those that PyTorch counts in a forward pass of one completion."""
    from bench_shared_prefix import Case, build_model
    from torch.utils.flop_counter import FlopCounterMode

    case = Case(1, 24, 8, 1)
    model = build_model(True, torch.float32)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(32)[None], logits_to_keep=8)
    counted = counter.get_total_flops()
    config = model.config
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    # PyTorch counts all pairs, of which a causal pass needs half; norms it does not count at all.
    needed = real_run_cases.work_of(case, model, None).needed / 3 + pair * 32**2 / 2
    assert needed == pytest.approx(counted, rel=5e-3)


def test_what_was_shared_and_dropped_is_not_done():
    from bench_shared_prefix import Case, build_model

    model = build_model(True, torch.float32)
    nothing = {"down_sampling/completions_dropped": 0.0, "down_sampling/flops_saved": 0.0}
    alone = real_run_cases.work_of(Case(3, 24, 8, 1), model, nothing)
    assert alone.done == pytest.approx(alone.needed)
    shared = real_run_cases.work_of(Case(3, 24, 8, 4), model, nothing)
    assert 0.4 < shared.done / shared.needed < 0.6
    half = {"down_sampling/completions_dropped": 6.0, "down_sampling/flops_saved": 0.5}
    assert real_run_cases.work_of(Case(3, 24, 8, 4), model, half).done < 0.52 * shared.done


def test_a_real_run_from_beginning_to_end(tmp_path):
    path = tmp_path / "rows.json"
    words = ("--tiny", "--only", "sparse head", "--json", str(path))
    answer = run_script("bench_real_run.py", *words, interpreted=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    rows = [Row(**found) for found in json.loads(path.read_text(encoding="utf-8"))]
    assert [row.case.split()[0] for row in rows] == ["rollout", "train", "step"]
    assert all(row.correct and row.p50_ms > 0 for row in rows)
    train = rows[1]
    assert train.percent_of_floor == pytest.approx(100 * train.floor_ms / train.p50_ms)
    assert "tokens/s" in train.note
    assert "of the operations done" in train.note


def test_the_log_has_the_resources_of_the_committed_table():
    page = tune_resources.PAGE.read_text(encoding="utf-8")
    rows = json.loads(tune_resources.ROWS.read_text(encoding="utf-8"))["rows"]
    expected = tune_resources.with_table(page, tune_resources.table(rows))
    assert page == expected, "run python benchmarks/tune_resources.py --write"
    assert "logits (bf16)" in tune_resources.table(rows)


def test_how_many_blocks_fit():
    """Numbers of NVIDIA's occupancy calculator for compute capability 9.0."""
    assert tune_resources.residency(128, 0, 8) == (2, "registers", 16)
    assert tune_resources.residency(129, 0, 8) == (1, "registers", 8)
    assert tune_resources.residency(32, 0, 8) == (8, "warps", 64)
    assert tune_resources.residency(32, 100 * 1024, 4) == (2, "shared memory", 8)
    assert tune_resources.residency(16, 0, 1).blocks == 32


def test_products_are_read_off_the_assembly():
    text = """
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f2};
    """
    assert tune_resources.products_of(text) == ["mma m16n8k16", "wgmma m64n64k16"]
