"""ScaleRL: a root mean square over all steps so far, in the formula, in runs and through a kill."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from fastrl.advantages import batch_rms
from fastrl.advantages.statistics import centre_in_groups, running_square
from fastrl.assembly import build_trainer
from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.methods import METHODS
from fastrl.methods.adaptation import SQUARES, Adaptation
from fastrl.phase_clock import PhaseClock
from fastrl.run import train
from tests.test_dynamic_sampling import assert_same_end, config_of, killed_after, steps_of

DECAY = 1e-3
UNLIMITED = {"max_thinking_tokens": 0}


def scalerl_config(directory: Path, **changes) -> Config:
    """Groups of which about half are wrong as a whole, and so dropped."""
    given = {"method": "scalerl", "objective": {"parameters": UNLIMITED}}
    return config_of(directory, "seldom", **{**given, **changes})


def transcribed(batches: list[list[float]], decay: float) -> list[float]:
    """Root mean square after each batch, one value after the other."""
    found, square, weight = [], 0.0, 0.0
    for batch in batches:
        for value in batch:
            square = (1 - decay) * square + decay * value * value
            weight = (1 - decay) * weight + decay
        found.append(math.sqrt(square / weight))
    return found


@pytest.mark.parametrize("decay", [1e-3, 0.3])
def test_the_running_mean_is_the_published_recursion(decay):
    generator = torch.Generator().manual_seed(2)
    groups = torch.arange(12) // 3
    batches = [torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(4)]
    centred = [centre_in_groups(rewards, groups) for rewards in batches]
    expected = transcribed([values.tolist() for values in centred], decay)
    past = torch.zeros(2, dtype=torch.float64)
    for rewards, values, rms in zip(batches, centred, expected, strict=True):
        advantages = batch_rms(rewards, groups, past, decay=decay)
        torch.testing.assert_close(advantages, values / (rms + 1e-4), rtol=1e-12, atol=0)
        past = running_square(values, past, decay=decay)
    weight = 1 - (1 - decay) ** 48
    assert float(past[1]) == pytest.approx(weight, rel=1e-12)


def test_batches_of_any_size_are_one_stream():
    values = torch.randn(257, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = running_square(values, torch.zeros(2, dtype=torch.float64), decay=0.01)
    parts = torch.zeros(2, dtype=torch.float64)
    for part in (values[:63], values[63:63], values[63:64], values[64:]):
        parts = running_square(part, parts, decay=0.01)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)


def test_the_batch_alone_is_the_default_and_what_a_small_decay_begins_with():
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = torch.arange(12) // 4
    past = torch.tensor([3.0, 0.5], dtype=torch.float64)
    alone = batch_rms(rewards, groups)
    assert torch.equal(alone, batch_rms(rewards, groups, past))
    torch.testing.assert_close(batch_rms(rewards, groups, decay=1e-9), alone, rtol=1e-6, atol=0)
    equal = batch_rms(torch.ones(4), torch.zeros(4, dtype=torch.int64), decay=DECAY)
    assert not equal.any()
    with pytest.raises(ValueError, match=r"decay in \[0, 1\), got 1"):
        batch_rms(rewards, groups, decay=1.0)


def test_advantages_of_a_run_are_scaled_by_all_that_was_trained(tmp_path):
    """Written out from what the trainer sampled; dropped groups do not enter."""
    trainer = build_trainer(scalerl_config(tmp_path / "run"))
    seen: list[list[float]] = []
    num_dropped = 0
    for step in range(4):
        scored = trainer.sampler.sample(step, PhaseClock(), keeps=None).trained
        groups = scored.rewards.total.double().view(-1, 4)
        kept = groups.std(dim=1) > 0
        num_dropped += int((~kept).sum())
        centred = groups - groups.mean(dim=1, keepdim=True)
        seen.append(centred[kept].flatten().tolist())
        inputs = trainer.inputs(scored.rollouts, scored.rewards, step)
        packed = trainer.pack(scored.rollouts, inputs)
        rms = transcribed(seen, DECAY)[-1]
        expected = centred / (rms + 1e-4) * kept[:, None]
        torch.testing.assert_close(
            packed.inputs.advantages.view(-1, 4), expected, rtol=1e-9, atol=1e-12
        )
        trainer.adaptation.remember(trainer.method, packed.inputs)
    assert 0 < num_dropped < 12


def test_a_killed_run_goes_on_with_the_same_root_mean_square(tmp_path):
    config = scalerl_config(tmp_path / "whole", max_steps=5)
    train(config)
    states = [
        json.loads((tmp_path / f"whole/checkpoint-{step}/trainer_state.json").read_text())
        for step in (2, 5)
    ]
    squares = [state["controllers"][SQUARES] for state in states]
    assert 0 < squares[0]["weight"] < squares[1]["weight"] < 1
    killed_after(2, tmp_path / "whole", tmp_path / "killed")
    train(dataclasses.replace(config, output_dir=str(tmp_path / "killed")), resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    last = tmp_path / "killed/checkpoint-5/trainer_state.json"
    assert json.loads(last.read_text())["controllers"][SQUARES] == squares[1]
    alone = {"parameters": {**UNLIMITED, "decay": 0.0}}
    train(scalerl_config(tmp_path / "alone", max_steps=5, objective=alone))
    assert steps_of(tmp_path / "alone") != steps_of(tmp_path / "whole")


def test_only_a_running_mean_is_remembered():
    method = METHODS["scalerl"]
    again = Adaptation(method)
    state = {SQUARES: {"total": 0.1 + 0.2, "weight": 1 / 3}}
    assert again.load_state_dict(json.loads(json.dumps(state)), method) == method
    assert again.state_dict() == state
    assert Adaptation(METHODS["grpo"]).state_dict() == {}


def test_a_decay_out_of_range_is_refused_before_the_run(tmp_path):
    objective = {"parameters": {**UNLIMITED, "decay": 1.0}}
    with pytest.raises(InputError, match=r"decay in \[0, 1\), got 1"):
        train(scalerl_config(tmp_path / "run", objective=objective))
    assert not (tmp_path / "run").exists()
