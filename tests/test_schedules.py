"""Schedules against their formulas, as words, and as hyper-parameters of a method."""

from __future__ import annotations

import math

import pytest
import torch

from fastrl.config import Config, ObjectiveConfig
from fastrl.config_io import load_config, objective_of, override_config, save_config
from fastrl.errors import InputError
from fastrl.methods import METHODS, resolve_method, use
from fastrl.methods.inputs import apply, scheduled
from fastrl.schedules import SHAPES, Schedule, read_schedule
from tests.helpers_methods import step_inputs


def test_schedules_are_their_formulas():
    for progress in (0.0, 0.1, 1 / 3, 0.5, 0.99):
        assert Schedule("constant", 0.3, 0.3).at(progress) == 0.3
        linear = Schedule("linear", 0.2, 1.0).at(progress)
        assert linear == pytest.approx(0.2 + 0.8 * progress, abs=1e-15)
        cosine = Schedule("cosine", 1.0, 0.25).at(progress)
        expected = 0.25 + 0.75 * (1 + math.cos(math.pi * progress)) / 2
        assert cosine == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_rest_outside_of_their_part_of_training(shape):
    schedule = Schedule(shape, 4.0, 4.0 if shape == "constant" else 8.0, 0.25, 0.75)
    assert [schedule.at(p) for p in (0.0, 0.25)] == [4.0, 4.0]
    assert schedule.at(0.75) == schedule.at(1.0) == schedule.end
    assert schedule.at(0.5) == (4.0 if shape == "constant" else 6.0)  # half-way is half-way
    values = [schedule.at(p / 100) for p in range(101)]
    assert values == sorted(values)


@pytest.mark.parametrize("words", ["constant 0.2", "linear 0.2 1", "cosine 1 0.25 0.1 0.8"])
def test_words_are_read_and_written_alike(words):
    assert str(read_schedule(words)) == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("linaer 0.2 1", "did you mean 'linear'?"),
        ("", "unknown schedule"),
        ("linear 0.2", "expected a number or a schedule such as"),
        ("linear 0.2 1 0.5", "expected a number or a schedule such as"),
        ("linear a b", "expected a number or a schedule such as"),
        ("constant 0.2 1", "expected a number or a schedule such as"),
        ("linear 0.2 1 0.8 0.1", "must begin before it ends"),
        ("linear 0.2 1 0.5 0.5", "must begin before it ends"),
        ("linear 0.2 1 0 2", "must begin before it ends"),
        ("linear 0.2 inf", "finite"),
    ],
)
def test_bad_words_are_refused(words, message):
    with pytest.raises(InputError, match="schedule") as error:
        read_schedule(words)
    assert message in str(error.value)


def test_the_numbers_of_the_moment_for_the_logs():
    assert scheduled(METHODS["d3s"], 0.5) == {
        "schedules/selection.kept_fraction": 0.375, "schedules/token_weights.fraction": 0.6,
    }  # fmt: skip
    assert scheduled(METHODS["grpo"], 0.5) == {}


def test_a_choice_takes_the_number_of_the_moment():
    """A fraction of tokens, and a count, which is rounded."""
    method = METHODS["d3s"]
    inputs = step_inputs([4], [5])
    advantages = torch.arange(20, dtype=torch.float64) + 1.0
    for progress, kept in ((0.0, 4), (0.5, 12), (1.0, 20)):
        now = inputs.__class__(
            **{
                **vars(inputs), "progress": torch.tensor(progress), "advantages": advantages,
                "entropies": torch.ones(20, dtype=torch.float64),
            }
        )  # fmt: skip
        weights = apply("token_weights", method.token_weights, now)
        assert weights.tolist() == [0.0] * (20 - kept) + [1.0] * kept
        choice = use("top_rewards", num_kept=Schedule("linear", 1, 4))
        assert int(apply("selection", choice, now).sum()) == round(1 + 3 * progress)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("d3s", {"kept_fraction": 0.0}, "kept_fraction must be above 0 and at most 1, got 0"),
        ("d3s", {"fraction": 1.5}, "fraction must be above 0 and at most 1, got 1.5"),
        ("d3s", {"fraction": "linear 0.2 2"}, "fraction must be above 0 and at most 1, got 2"),
        ("d3s", {"fraction": "linear 0 1"}, "fraction must be above 0 and at most 1, got 0"),
        ("d3s", {"fraction": "linear 0.2 1 0.9 0.1"}, "must begin before it ends"),
        ("d3s", {"num_kept": 0}, "num_kept must be at least 1, got 0"),
        ("d3s", {"num_kept": 2.5}, "num_kept must be a whole number, got 2.5"),
        ("d3s", {"num_kept": "linear 2.5 8"}, "num_kept must be a whole number, got 2.5"),
        ("d3s", {"std_epsilon": "linear 0 1"}, "std_epsilon cannot follow a schedule"),
        ("grpo", {"surrogate.epsilon_low": "linear 0.1 0.2"}, "cannot follow a schedule"),
        ("d3s", {"fraction": True}, "must be a number, got True"),
        ("grpo", {"std_epsilon": math.nan}, "must be a number, got nan"),
        ("d3s", {"num_kept": math.inf}, "num_kept must be a whole number, got inf"),
    ],
)
def test_what_no_step_can_use_is_refused_before_the_run(name, overrides, message):
    with pytest.raises(InputError) as error:
        resolve_method(name, ObjectiveConfig(parameters=overrides))
    assert message in str(error.value)


def test_schedules_in_a_config_and_on_the_command_line(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        'method = "d3s"\n[objective.parameters]\nfraction = "cosine 0.1 0.9 0 0.5"\nnum_kept = 4\n'
    )
    config = load_config(path)
    method = resolve_method(config.method, objective_of(config))
    assert method.token_weights == use(
        "advantage_entropy", fraction=Schedule("cosine", 0.1, 0.9, 0.0, 0.5)
    )
    assert method.selection.parameters["num_kept"] == 4
    save_config(config, tmp_path / "again.toml")
    assert load_config(tmp_path / "again.toml") == config
    flags = ["--objective.parameters", "fraction", "linear 0.5 1", "num_kept", "3"]
    config = override_config(Config(method="d3s"), flags, "fastrl train")
    method = resolve_method(config.method, objective_of(config))
    assert method.token_weights.parameters["fraction"] == Schedule("linear", 0.5, 1.0)
    assert method.selection.parameters["num_kept"] == 3
