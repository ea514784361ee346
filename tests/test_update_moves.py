"""Weights that move without a gradient: references that follow, and steps that come back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastrl.assembly import build_trainer
from fastrl.config import ModelConfig, SaveConfig
from fastrl.controllers import EntropyBreak
from fastrl.errors import InputError
from fastrl.methods.adaptation import Adaptation
from fastrl.methods.record import use
from fastrl.phase_clock import PhaseClock
from fastrl.reference import make_reference
from fastrl.run import train
from fastrl.weight_moves import moving_average, reset
from tests.helpers import TINY
from tests.test_training import numbers, tiny_config


def parameters_of(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_when_and_how_far_a_reference_moves():
    assert [moving_average(s, mixup_alpha=0.6, sync_steps=3) for s in range(6)] == [
        0, 0, 0.6, 0, 0, 0.6,
    ]  # fmt: skip
    assert [reset(s, sync_steps=2) for s in range(4)] == [0, 1, 0, 1]


def test_a_reference_follows_the_policy():
    """T1 moves it after every step; the next step is compared with where it is then."""
    trainer = build_trainer(tiny_config("unused", method="t1"))
    trainer.reference = make_reference(trainer.policy, "auto", moves=True)
    expected = parameters_of(trainer.policy.model)
    for step in range(3):
        metrics = trainer.train_step(step).metrics
        assert (metrics["kl"] > 0) == (step > 0)
        weights = parameters_of(trainer.policy.model)
        expected = [torch.lerp(x, y, 0.01) for x, y in zip(expected, weights, strict=True)]
        found = parameters_of(trainer.reference.policy.model)
        assert all(map(torch.equal, found, expected))


def test_a_reference_is_put_where_the_policy_is():
    trainer = build_trainer(tiny_config("unused", method="t1"))
    trainer.method = dataclasses.replace(
        trainer.method, reference_update=use("reset", sync_steps=2)
    )
    trainer.reference = make_reference(trainer.policy, "auto", moves=True)
    before = parameters_of(trainer.policy.model)
    trainer.train_step(0)
    assert all(map(torch.equal, parameters_of(trainer.reference.policy.model), before))
    trainer.train_step(1)
    weights = parameters_of(trainer.policy.model)
    assert all(map(torch.equal, parameters_of(trainer.reference.policy.model), weights))


def sfpo(**changes):
    return build_trainer(tiny_config("unused", method="sfpo", **changes))


def test_a_slow_step_starts_on_the_way_back():
    """Three iterations, 0.8 of the way they went, one more: as four by hand."""
    trainer, truth = sfpo(), build_trainer(tiny_config("unused", num_iterations=3))
    start = parameters_of(truth.policy.model)
    step = truth.sample(0, PhaseClock())
    inputs = truth.inputs(step.trained.rollouts, step.trained.rewards, 0)
    packed = truth.pack(step.trained.rollouts, inputs)
    truth.updater.update(packed, 0, sampler_is_exact=False)
    fast = parameters_of(truth.policy.model)
    with torch.no_grad():
        for weight, a, b in zip(truth.policy.model.parameters(), start, fast, strict=True):
            weight.copy_(a + 0.8 * (b - a))
    # The slow step has ratios to the policy of before the step.
    old = build_trainer(tiny_config("unused"))
    old_passes = old.pack(step.trained.rollouts, inputs).parts
    logps = old.updater._measure(old_passes[0].passes).statistics
    passes = [
        dataclasses.replace(item, batch=dataclasses.replace(item.batch, old_logps=x.logps))
        for item, x in zip(packed.parts[0].passes, logps, strict=True)
    ]
    last = packed._replace(parts=[packed.parts[0]._replace(passes=passes)])
    truth.config = dataclasses.replace(truth.config, num_iterations=1)
    truth.updater.config = truth.config
    truth.updater.update(last, 0, sampler_is_exact=False)
    trainer.train_step(0)
    for found, expected in zip(
        trainer.policy.model.parameters(), truth.policy.model.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_without_a_way_back_it_is_grpo():
    trainer, plain = sfpo(), build_trainer(tiny_config("unused"))
    look_ahead = use("slow_fast", fast_steps=3, way_back=0.0)
    trainer.method = dataclasses.replace(trainer.method, look_ahead=look_ahead)
    for one in (trainer, plain):
        one.train_step(0)
    weights = parameters_of(plain.policy.model)
    assert all(map(torch.equal, parameters_of(trainer.policy.model), weights))


def test_entropy_that_breaks_out_ends_fast_steps():
    trainer = sfpo()
    adaptation, method = trainer.adaptation, trainer.method
    past = [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0]
    for entropy in (5.0, *past, 1.16):  # the first has left the window, the last is within 2 std
        method = adaptation.update(method, {"entropy": entropy}, 12)
        assert method.look_ahead.parameters["way_back"] == 0.8
    state = adaptation.state_dict()
    again = Adaptation(trainer.method)
    restored = again.load_state_dict(state, trainer.method)
    assert restored == method
    for one in (adaptation, again):
        moved = one.update(method, {"entropy": 0.6}, 12)
        assert moved.look_ahead.parameters["way_back"] == 0
        moved = one.update(moved, {"entropy": 1.0}, 12)  # for good
        assert moved.look_ahead.parameters["way_back"] == 0
    with pytest.raises(ValueError, match="a window of 2 steps or more"):
        EntropyBreak(0.8, window=1)


def test_weights_that_are_kept_in_two_places_cannot_come_back():
    model = ModelConfig(architecture={"model_type": "qwen3", **TINY}, precision="split")
    trainer = sfpo(model=model)
    with pytest.raises(InputError, match="keeps a part of them elsewhere"):
        trainer.train_step(0)


@pytest.mark.parametrize(("method", "lora"), [("t1", {}), ("t1", {"r": 4}), ("sfpo", {})])
def test_a_run_goes_on_to_the_same_bits(tmp_path, method, lora):
    """Where the reference had moved to, and the entropies of the steps before."""
    model = ModelConfig(architecture={"model_type": "qwen3", **TINY}, lora=lora)
    whole = tiny_config(tmp_path / "whole", method=method, max_steps=6, model=model)
    train(whole)
    parted = dataclasses.replace(
        whole, output_dir=str(tmp_path / "parted"), save=SaveConfig(save_steps=3)
    )
    train(dataclasses.replace(parted, max_steps=5))
    train(parted, resume=True)
    rows = [row for row in numbers(tmp_path / "parted") if "loss" in row]
    assert rows == [row for row in numbers(tmp_path / "whole") if "loss" in row]
