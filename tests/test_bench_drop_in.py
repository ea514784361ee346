"""What benchmarks/bench_drop_in.py compares: TRL's trainers, as they are and accelerated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # as a script there has it

from bench_drop_in import TOLERANCE, settings
from drop_in import Updates, errors


@pytest.mark.parametrize("name", ["dapo beta=0.04", "dapo in micro-batches of 2", "dpo"])
def test_updates_agree_and_repeat(name):
    """And the weights stay, so that every timed update is the same one."""
    (setting,) = (x for x in settings(quick=True) if x.name == name)
    both = [Updates(setting, is_ours=ours, quick=True) for ours in (True, False)]
    outcomes = [updates.outcome() for updates in both]
    assert max(errors(*outcomes)) <= TOLERANCE
    assert outcomes[1].grad_norm > 0.01
    for updates, outcome in zip(both, outcomes, strict=True):
        assert updates.update() > 0
        again = updates.outcome()
        assert again.loss == outcome.loss
        assert all(map(torch.equal, again.gradients, outcome.gradients))
    wrong = outcomes[0]._replace(gradients=[1.001 * x for x in outcomes[0].gradients])
    assert errors(wrong, outcomes[1])[1] > TOLERANCE
