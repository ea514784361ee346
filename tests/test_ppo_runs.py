"""Whole runs of methods with a value model: what they log, and that a resumed one is the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastrl.config import CriticConfig, ModelConfig, SaveConfig
from fastrl.report import read_metrics
from fastrl.run import train
from tests.helpers import TINY
from tests.test_training import numbers, tiny_config, weights

VALUES = ("val/loss", "val/clipfrac", "val/mean", "val/target_mean", "val/var_explained")


@pytest.mark.parametrize("kind", ["head", "lora"])
@pytest.mark.parametrize("method", ["ppo_max"])
def test_a_run_goes_on_to_the_same_bits(tmp_path, method, kind):
    """Value model, its optimizer, the spread of rewards, the order of mini-batches and warm-up."""
    whole = tiny_config(
        tmp_path / "whole", method=method, max_steps=6, num_mini_batches=2, num_iterations=2,
        objective={"parameters": {"critic_warmup_steps": 1, "critic_learning_rate": 1e-2}},
        critic=CriticConfig(model=kind),
        model=ModelConfig(
            architecture={"model_type": "qwen3", **TINY}, lora={"r": 4} if kind == "lora" else {}
        ),
    )  # fmt: skip
    train(whole)
    parted = dataclasses.replace(
        whole, output_dir=str(tmp_path / "parted"), save=SaveConfig(save_steps=3)
    )
    train(dataclasses.replace(parted, max_steps=5))
    train(parted, resume=True)
    rows = [row for row in numbers(tmp_path / "parted") if "loss" in row]
    assert rows == [row for row in numbers(tmp_path / "whole") if "loss" in row]
    assert all(name in row for row in rows for name in VALUES)
    assert [row["learning_rate"] == 0 for row in rows] == [True] + [False] * 5
    if kind == "head":
        for name, value in weights(tmp_path / "whole").items():
            assert torch.equal(value, weights(tmp_path / "parted")[name]), name


def test_a_run_has_its_numbers(tmp_path):
    train(tiny_config(tmp_path / "run", method="ppo", num_mini_batches=2))
    for row in read_metrics(tmp_path / "run"):
        if "loss" in row:
            assert {"objective/kl", "skipped/non_finite", *VALUES} <= set(row)


def test_windows_of_completions_go_on_and_are_trained_on_whole(tmp_path):
    """T-PPO with partial rollouts: its ratios are to the policies that drew each token."""
    config = tiny_config(tmp_path / "run", method="t_ppo", max_steps=5)
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, max_tokens_per_step=24)
    )
    train(config)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    trained = [row for row in rows if "val/loss" in row]
    assert any(row["rollout/carried_completions"] > 0 for row in rows)
    assert any(row["rollout/staleness_max"] > 0 for row in trained)
    assert all(row["grad_norm"] > 0 for row in trained)
