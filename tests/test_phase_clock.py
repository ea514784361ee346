"""Memory of phases, measured in this process."""

from __future__ import annotations

import mmap

import pytest
import torch

from fastrl.assembly import build_trainer
from fastrl.phase_clock import PeakMemory, PhaseClock
from tests.test_training import tiny_config

MIB = 2**20


@pytest.mark.skipif(not PeakMemory(torch.device("cpu")).has_phases, reason="needs Linux's /proc")
def test_a_phase_has_the_memory_that_it_took():
    memory = PeakMemory(torch.device("cpu"))
    clock = PhaseClock(memory)
    clock.lap("empty")
    taken = mmap.mmap(-1, 64 * MIB)  # not from the heap, which may keep what is freed
    for start in range(0, 64 * MIB, mmap.PAGESIZE):
        taken[start] = 1
    clock.lap("held")
    taken.close()
    clock.lap("between")
    clock.lap("after")
    held = clock.peaks["held"] - clock.peaks["empty"]
    assert 60 * MIB < held < 80 * MIB
    assert clock.peaks["after"] < clock.peaks["held"] - 50 * MIB
    assert clock.peaks["held"] <= memory.highest < clock.peaks["held"] + MIB
    assert clock.metrics["memory/peak_gib"] == memory.highest / 2**30
    assert clock.metrics["step_time"] == pytest.approx(sum(clock.laps.values()))


def test_every_phase_of_a_step_is_in_its_metrics(tmp_path):
    metrics = build_trainer(tiny_config(tmp_path / "run")).train_step(0).metrics
    for phase in ("rollout", "score", "train"):
        assert metrics[f"time/{phase}"] > 0
        assert 0 < metrics[f"memory/{phase}_gib"] <= metrics["memory/peak_gib"]
