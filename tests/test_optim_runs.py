"""Whole runs with the optimizer's memory modes: resumed runs, and two phases, to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrl.assembly import build_trainer
from fastrl.config import Config, ModelConfig, OptimConfig, SaveConfig, WarmStartConfig
from fastrl.errors import InputError
from fastrl.run import train
from fastrl.trainer import StepOutput, Trainer
from fastrl.warm_start import WarmStart
from tests.test_training import TINY, tiny_config


def config_of(
    output_dir: Path, *, precision: str = "float32", max_tokens_per_pass: int = 4096, **optim
) -> Config:
    return tiny_config(
        output_dir,
        max_tokens_per_pass=max_tokens_per_pass,
        model=ModelConfig(architecture={"model_type": "qwen3", **TINY}, precision=precision),
        optim=OptimConfig(learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=2, **optim),
        warm_start=WarmStartConfig(steps=3, batch_size=8),
    )


def trained(config: Config, num_steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Norms of a warm start and of steps after it, and the weights that they lead to."""
    trainer = build_trainer(config)
    phase = WarmStart(config, trainer)
    found = [phase.train_step(step) for step in range(config.warm_start.steps)]
    found += [trainer.train_step(step).metrics["grad_norm"] for step in range(num_steps)]
    weights = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    return found, weights


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("float32", "adamw"), ("split", "adamw_8bit"), ("stochastic", "adamw_offload")],
)
@pytest.mark.parametrize("max_tokens_per_pass", [128, 4096])
def test_two_phases_train_as_one_does(tmp_path, precision, optimizer, max_tokens_per_pass):
    """One pass a step, which runs twice; and several, which do not."""
    runs = [
        trained(
            config_of(
                tmp_path, precision=precision, optimizer=optimizer, in_backward=mode,
                max_tokens_per_pass=max_tokens_per_pass,
            ),
            3,
        )
        for mode in ("off", "two_phase")
    ]  # fmt: skip
    assert runs[0][0] == runs[1][0]
    assert all(norm > 0 for norm in runs[0][0])
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name
        assert value.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)


@pytest.mark.parametrize("in_backward", ["off", "previous_norm"])
def test_a_run_that_is_killed_ends_as_one_that_was_not(tmp_path, in_backward, monkeypatch):
    """Stopped after a step, and in the warm start, with bits that only the optimizer has."""
    whole, stopped = (
        config_of(
            tmp_path / name, precision="split", optimizer="adamw_8bit", in_backward=in_backward
        )
        for name in ("whole", "stopped")
    )
    train(whole)
    stopped = dataclasses.replace(stopped, save=SaveConfig(save_steps=1))
    original = Trainer.train_step

    def killed(self: Trainer, step: int) -> StepOutput:
        if step == 2:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.setattr(Trainer, "train_step", original)
    train(stopped, resume=True)
    found, expected = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("stopped", "whole")
    )
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_modes_that_exclude_each_other_are_refused_before_the_run(tmp_path):
    config = config_of(tmp_path, precision="split", optimizer="bnb_adamw_8bit")
    with pytest.raises(InputError, match="exclude each other"):
        build_trainer(config)
    optim = dataclasses.replace(config.optim, optimizer="adamw", lr_scheduler_type="cosin")
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        build_trainer(dataclasses.replace(config, optim=optim))
