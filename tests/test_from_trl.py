"""Arguments of TRL's GRPOTrainer become a config that trains the same loss, or are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastrl.config import Config
from fastrl.config_io import load_config, objective_of, save_config
from fastrl.errors import InputError
from fastrl.integrations.trl import LOSSES, SAME, from_trl
from fastrl.methods import resolve_method
from tests.test_trl_parity import Step, of_ours, of_trl

trl = pytest.importorskip("trl")


def arguments(**settings):
    defaults = {"output_dir": "runs/x", "max_steps": 100, "bf16": False, "use_cpu": True}
    return trl.GRPOConfig(**{**defaults, **settings})


def test_defaults_are_trls_own():
    config, notes = from_trl(arguments(), task="jsonl:x")
    assert notes == []
    assert config.task == "jsonl:x"
    assert config.objective == {
        "surrogate": "clipped_ratio", "aggregation": "token_mean", "advantage": "group_relative",
        "epsilon_low": 0.2, "epsilon_high": 0.2,
    }  # fmt: skip
    assert (config.prompts_per_step, config.rollout.num_generations) == (1, 8)
    assert (config.max_steps, config.optim.lr_scheduler_type) == (100, "linear")
    assert config.model.gradient_checkpointing
    assert config.rollout.max_completion_length == 512


def test_counts_of_optimizer_steps_become_counts_of_batches(tmp_path):
    given = arguments(
        per_device_train_batch_size=16, gradient_accumulation_steps=2, steps_per_generation=6,
        num_iterations=2, num_generations=4, max_steps=600, warmup_steps=60, save_steps=12,
        eval_strategy="steps", eval_steps=30, bf16=True, optim="paged_adamw_8bit", seed=7,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-7},
        report_to=["tensorboard"], logging_steps=1, top_k=5, min_p=0.1, beta=0.04,
    )  # fmt: skip
    config, notes = from_trl(given)
    assert config.prompts_per_step == 16 * 6 // 4
    assert (config.num_mini_batches, config.num_iterations) == (3, 2)
    assert (config.max_steps, config.optim.warmup_steps) == (100, 10)
    assert (config.save.save_steps, config.eval.eval_steps) == (2, 5)
    assert (config.model.precision, config.optim.optimizer) == ("autocast", "bnb_paged_adamw_8bit")
    assert config.optim.lr_scheduler_type == "cosine_with_min_lr"
    assert (config.rollout.top_k, config.rollout.min_p, config.seed) == (5, 0.1, 7)
    assert (config.objective["beta"], config.objective["regulariser"]) == (0.04, "k3_is")
    assert any(note.startswith("report_to") for note in notes)
    save_config(config, tmp_path / "config.toml")  # every value has the type of its field
    assert load_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize("level", LOSSES)
@pytest.mark.parametrize("log_ratio", [0.0, 0.3])
def test_the_loss_of_an_imported_config_is_trls(level, log_ratio):
    loss_type, sampling_level = level
    settings = {"loss_type": loss_type, "importance_sampling_level": sampling_level}
    settings |= {"epsilon": 0.1, "epsilon_high": 5.0 if loss_type == "cispo" else 0.15}
    if loss_type == "vespo":
        settings |= {"vespo_k_pos": 1.5, "vespo_lambda_neg": 2.5}
    if loss_type == "sapo":
        settings |= {"sapo_temperature_neg": 1.3, "sapo_temperature_pos": 0.9}
    config = from_trl(arguments(**settings)).config
    inner = {key: value for key, value in settings.items() if key != "epsilon"}
    step = Step(log_ratio)
    expected_loss, expected = of_trl(step, epsilon_low=0.1, **inner)
    loss, gradient = of_ours(step, resolve_method(config.method, objective_of(config)))
    assert loss == pytest.approx(expected_loss, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"delta": 1.5}, "two_sided_clipped_ratio"),
        ({"top_entropy_quantile": 0.2}, "high_entropy"),
        ({"sync_ref_model": True, "beta": 0.1}, "moving_average"),
        ({"scale_rewards": "batch"}, "batch_relative"),
        ({"scale_rewards": False}, "group_centred"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "decoupled_rewards"),
    ],
)
def test_what_a_method_is_made_of(settings, method):
    config = from_trl(arguments(**settings)).config
    resolved = resolve_method(config.method, objective_of(config))
    assert method in {choice.name for choice in resolved.choices.values()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "max_steps is not set"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, "has no counterpart"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold = 0.1 has no counterpart"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha = 5.0 has no counterpart"),
        ({"optim": "adafactor"}, "GRPOConfig.optim 'adafactor' has no counterpart"),
        ({"adam_epsilon": 1e-5}, "adam_epsilon = 1e-05 has no counterpart"),
        ({"delta": 1.5, "loss_type": "sapo"}, "delta has no effect on loss_type 'sapo'"),
    ],
)
def test_what_would_train_something_else_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        from_trl(arguments(**settings))


def test_unknown_fields_name_the_nearest():
    with pytest.raises(InputError, match="no field 'taks'; did you mean 'task'"):
        from_trl(arguments(), taks="x")


def test_names_exist_on_both_sides():
    theirs = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert set(SAME.values()) <= theirs
    for path in SAME:
        value = Config()
        for part in path.split("."):
            value = getattr(value, part)
