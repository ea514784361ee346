"""memory_limit: what is refused before a run, and what really fails beyond it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrl.loss
from fastrl.assembly import build_trainer
from fastrl.config import CriticConfig
from fastrl.errors import InputError
from fastrl.memory.expected import Expected, held
from fastrl.memory.limit import MemoryLimit, device_bytes, limit_of, resident_bytes
from fastrl.memory.plan import GIB, MemoryPlan, Phase
from fastrl.methods.needs import requirements
from fastrl.reference import make_reference
from fastrl.report import read_metrics
from fastrl.run import train
from tests.test_training import numbers, tiny_config

CPU = torch.device("cpu")
MIB = 2**20
ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux")


def test_no_limit_changes_nothing():
    limit = MemoryLimit(None, CPU)
    with limit.kept():
        assert torch.ones(3).sum() == 3


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_limit_of_a_gpu_is_a_share_of_its_memory(monkeypatch, name):
    """As far as torch's own checks: a device without a number is the current one."""
    shares = []
    monkeypatch.setattr("fastrl.memory.limit.device_bytes", lambda device: 8 * GIB)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda *given: shares.append(given), raising=False
    )
    with MemoryLimit(6 * GIB, torch.device(name), outside=2 * GIB).kept():
        assert shares == [(0.5, 0)]
    assert shares[1:] == [(1.0, 0)]


@linux
@pytest.mark.parametrize(("given", "found"), [("2GiB", 2 * GIB), ("512 MiB", 512 * MIB)])
def test_a_limit_is_a_size(given, found):
    config = tiny_config("unused", memory_limit=given)
    assert limit_of(config).limit == found
    assert limit_of(dataclasses.replace(config, memory_limit=None)).limit is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("9999999GiB", "is 1e[+]07 GiB, but this machine has .* lower it, or remove it"),
        ("much", "memory_limit must be a card, such as rtx4090, or a size"),
        ("0GiB", "memory_limit must be more than nothing"),
    ],
)
def test_a_limit_that_is_none_is_refused_before_anything(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        train(tiny_config(tmp_path / "run", memory_limit=given))
    assert not (tmp_path / "run").exists()


def test_a_machine_has_as_much_as_its_group_of_processes_may_have(monkeypatch, tmp_path):
    total = device_bytes(CPU)
    assert total >= resident_bytes() > 100 * MIB
    path = tmp_path / "memory.max"
    monkeypatch.setattr("fastrl.memory.limit.CGROUP", path)
    path.write_text("max\n")
    assert device_bytes(CPU) >= total
    path.write_text(f"{GIB}\n")
    assert device_bytes(CPU) == GIB


@linux
def test_a_limit_that_nothing_fits_names_the_smallest_that_would_do(tmp_path):
    config = tiny_config(tmp_path / "run")
    with pytest.raises(InputError, match="the smallest limit that would do") as found:
        train(dataclasses.replace(config, memory_limit="64MiB"))
    needed = re.search(r"even passes of 53 tokens need ([\d.]+) GiB", str(found.value))
    # What this process holds already counts too, and a long run of tests holds much.
    assert 0.0625 < float(needed[1]) < 0.0625 + resident_bytes() / GIB + 1
    assert not (tmp_path / "run").exists()


@linux
def test_a_limit_below_the_plan_is_a_note_and_one_above_is_none():
    config = tiny_config("unused", max_tokens_per_pass=4096, prompts_per_step=64)
    expected = Expected(config, CPU, before=resident_bytes())
    assert expected.notes == []
    smallest = dataclasses.replace(config, max_tokens_per_pass=53)
    least = expected.survey.plan(smallest).needed + expected.before
    assert least < expected.needed
    assert expected.check(expected.needed, "enough", smallest) == []
    (note,) = expected.check(expected.needed - 1, "less", smallest)
    assert note.startswith("the plan needs ")
    assert "more than memory_limit less" in note
    assert "fastrl plan CONFIG --fit" in note
    assert expected.check(least, "just", smallest)
    with pytest.raises(InputError, match="'too little' is"):
        expected.check(least - 1, "too little", smallest)


def test_phases_of_a_plan_are_those_that_a_run_measures():
    expected = object.__new__(Expected)
    phases = (
        Phase("rollout", {"weights": 100, "optimizer": 200, "keys and values": 50}),
        Phase("score", {"weights": 100, "optimizer": 200, "activations": 7}),
        Phase("update", {"weights": 100, "optimizer": 200, "activations": 70}),
        Phase("step", {"weights": 100, "optimizer": 200, "gradients": 100}),
        Phase("evaluate", {"weights": 100, "optimizer": 200, "keys and values": 500}),
    )
    expected.plan, expected.before = MemoryPlan("cpu", phases, outside=3, slack=5), 1000
    assert expected.peaks == {"rollout": 1350, "score": 1300, "train": 1400}
    assert held(phases[0]) == 300
    assert expected.highest == 1800
    assert expected.needed == 1808
    expected.plan = None
    assert expected.peaks == {}
    assert expected.highest is None


def test_the_plan_stands_beside_what_is_measured(tmp_path):
    config = tiny_config(tmp_path / "run", max_steps=2)
    summary = train(config)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    for row in rows:
        for phase in ("rollout", "score", "train"):
            planned, measured = row[f"memory/{phase}_plan_gib"], row[f"memory/{phase}_gib"]
            # In the process of a test suite what others left behind is resident as well.
            assert 0 < planned == pytest.approx(measured, abs=0.3)
        assert row["memory/score_plan_gib"] < row["memory/train_plan_gib"]
    assert summary["planned_memory_bytes"] == pytest.approx(summary["peak_memory_bytes"], abs=3e8)


def test_a_model_that_cannot_be_planned_is_trained_without(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise InputError("model.layers.0.mixer (Odd) cannot be planned")

    monkeypatch.setattr("fastrl.memory.expected.surveyed", refuse)
    summary = train(tiny_config(tmp_path / "run", max_steps=1))
    shown = capsys.readouterr().out
    assert shown.count("memory is not compared with a plan: model.layers.0.mixer (Odd)") == 1
    assert summary["planned_memory_bytes"] is None
    (row,) = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert not any(name.endswith("_plan_gib") for name in row)


@linux
def test_what_goes_beyond_a_limit_fails_and_a_run_goes_on_in_smaller_passes(tmp_path):
    """Real allocations in a process of its own; its children and workers have no limit."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "memory_limit_run.py"), str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["fails_within"] == {"large": True, "python": True, "small": True, "fits": False}
    assert found["fails_in_child"] is False
    assert found["fails_afterwards"] is False
    assert found["excess_mib"] <= 1
    assert 1 <= found["failures"] <= 2
    assert found["passes"] >= 2
    assert found["same_metrics"]
    assert found["same_weights"]
    assert found["peak_mib"] <= found["limit_mib"] + 1
    assert found["unlimited_workers"] == 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective": {"beta": 0.1}}, {"method": "ppo", "critic": CriticConfig(model="head")},
     {"method": "d3s", "objective": {"scores_from": "policy"}}],
    ids=["grpo", "KL", "ppo", "d3s"],
)  # fmt: skip
def test_every_loss_gets_the_workspace_of_the_configuration(monkeypatch, changes):
    seen = set()
    for name in ("policy_loss", "linear_logps"):
        original = getattr(fastrl.loss, name)

        def watched(*args, original=original, name=name, **options):
            seen.add((name, options["workspace_mb"]))
            return original(*args, **options)

        monkeypatch.setattr(fastrl.loss, name, watched)
    trainer = build_trainer(tiny_config("unused", workspace_mb=3.5, **changes))
    if "ref_logps" in requirements(trainer.method):
        trainer.reference = make_reference(trainer.policy, "copy")
    trainer.train_step(0)
    assert ("policy_loss", 3.5) in seen
    assert ("linear_logps" in {name for name, _ in seen}) == bool(changes)
    assert {size for _, size in seen} == {3.5}


def test_a_workspace_without_room_for_a_row_is_refused_before_a_run(tmp_path):
    with pytest.raises(InputError, match="workspace_mb must hold one row of"):
        train(tiny_config(tmp_path / "run", workspace_mb=0.001))
    assert not (tmp_path / "run").exists()


def test_a_workspace_is_no_other_run(tmp_path):
    """What it decides is in which pieces the same sums are made."""
    for name, size in (("usual", 256), ("small", 4)):
        train(tiny_config(tmp_path / name, max_steps=1, workspace_mb=size))
    first, second = (numbers(tmp_path / name)[1] for name in ("usual", "small"))
    for key in ("loss", "grad_norm", "entropy"):
        assert first[key] == pytest.approx(second[key], rel=1e-4, abs=1e-6)
