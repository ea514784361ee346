"""Checkpoints that are whole or recognised as damaged, the best of them, and what may change."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil

import pytest

from fastrl.checkpoint import TrainerState, newest_checkpoint
from fastrl.config import EvalConfig, OptimConfig, SaveConfig
from fastrl.errors import InputError
from fastrl.evaluate import Evaluation
from fastrl.report import read_metrics
from fastrl.run import train
from fastrl.whole_directory import problem_of, renamed_when_whole
from tests.test_training import numbers, tiny_config, weights


def steps(directory):
    return [row for row in numbers(directory) if "loss" in row]


def checkpoints(directory):
    return sorted(path.name for path in directory.glob("checkpoint-*"))


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "made"
    for text in ("first", "second"):
        with renamed_when_whole(target) as partial:
            (partial / "below").mkdir()
            (partial / "below" / "data").write_text(text)
            assert not target.exists() or (target / "below" / "data").read_text() == "first"
        assert (target / "below" / "data").read_text() == text
        assert problem_of(target) is None
    with pytest.raises(FileNotFoundError), renamed_when_whole(target) as partial:
        (partial / "nowhere" / "data").write_text("third")
    assert (target / "below" / "data").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: (path / "a").write_bytes(b"12"), "a has 2 bytes, not 3"),
        (lambda path: (path / "a").write_bytes(b"124"), "a is not what was written"),
        (lambda path: (path / "a").unlink(), "a is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    ],
)
def test_damage_is_found(tmp_path, damage, problem):
    with renamed_when_whole(tmp_path / "x") as partial:
        (partial / "a").write_bytes(b"123")
    damage(tmp_path / "x")
    assert problem in problem_of(tmp_path / "x")


DAMAGED = ["optimizer.pt", "model.safetensors", "trainer_state.json"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_passed_over_and_written_again(tmp_path, capsys, name):
    whole, run = tmp_path / "whole", tmp_path / "run"
    config = tiny_config(run, save=SaveConfig(save_steps=1), max_steps=4)
    train(dataclasses.replace(config, output_dir=str(whole)))
    train(dataclasses.replace(config, max_steps=3))
    file = run / "checkpoint-3" / name
    file.write_bytes(file.read_bytes()[:-1])  # torn
    capsys.readouterr()
    train(config, resume=True)
    shown = capsys.readouterr().out
    assert f"checkpoint-3 is damaged and was passed over: {name} has" in shown
    assert steps(run) == steps(whole)
    assert all((weights(run)[key] == value).all() for key, value in weights(whole).items())
    assert checkpoints(run) == ["checkpoint-3", "checkpoint-4"]
    assert all(problem_of(run / path) is None for path in checkpoints(run))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(tmp_path):
    config = tiny_config(tmp_path / "run", save=SaveConfig(save_steps=1), max_steps=2)
    train(config)
    for name in checkpoints(tmp_path / "run"):
        (tmp_path / "run" / name / "config.json").unlink()
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole .*config.json is missing"):
        train(dataclasses.replace(config, max_steps=3), resume=True)
    for name in checkpoints(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run" / name)
    assert newest_checkpoint(tmp_path / "run").checkpoint is None


def test_the_first_of_the_best_evaluations_counts():
    state = TrainerState()
    for step, value in enumerate([0.2, 0.5, 0.4, 0.5, 0.3]):
        state = state.judged(step, value)
    assert (state.best_step, state.best_pass_at_1, state.num_worse) == (1, 0.5, 3)
    assert state.judged(5, 0.6).num_worse == 0


def scripted(monkeypatch, values):
    """Evaluations with these values of pass@1, one after the other; the run has no task to do."""
    left = list(values)

    def evaluate(*_):
        return Evaluation({1: left.pop(0)}, 0.0, 1.0, 1.0, 8, 2)

    monkeypatch.setattr("fastrl.run.evaluate_held_out", evaluate)


def test_the_best_checkpoint_outlives_newer_ones(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6])
    save = SaveConfig(save_steps=1, save_total_limit=2)
    evaluation = EvalConfig(eval_steps=1, num_samples=2)
    summary = train(tiny_config(tmp_path / "run", max_steps=6, save=save, eval=evaluation))
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    assert (summary["best_step"], summary["best_pass_at_1"]) == (2, 0.9)
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert (state["best_step"], state["num_worse"]) == (2, 4)


def test_a_better_evaluation_is_saved_between_checkpoints(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.2, 0.9, 0.3, 0.4])
    save, evaluation = SaveConfig(save_steps=4), EvalConfig(eval_steps=1, num_samples=2)
    train(tiny_config(tmp_path / "run", max_steps=4, save=save, eval=evaluation))
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]


def test_a_run_that_no_longer_gets_better_stops(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [0.1, 0.5, 0.4, 0.5, 0.9])
    evaluation = EvalConfig(eval_steps=1, num_samples=2, patience=2)
    config = tiny_config(tmp_path / "run", max_steps=9, eval=evaluation)
    summary = train(config)
    assert (summary["steps"], summary["best_step"], summary["pass_at_1_after"]) == (3, 1, 0.5)
    assert "no better pass@1 in 2 evaluations: stopped early" in capsys.readouterr().out
    assert len([row for row in read_metrics(tmp_path / "run") if "loss" in row]) == 3
    patient = dataclasses.replace(config, eval=dataclasses.replace(evaluation, patience=3))
    scripted(monkeypatch, [0.6, 0.5, 0.4, 0.3])
    assert train(patient, resume=True)["steps"] == 7


def test_a_resumed_run_changes_what_it_was_told_to(tmp_path):
    config = tiny_config(tmp_path / "run", max_steps=2)
    train(config)
    optim = OptimConfig(learning_rate=1e-9, weight_decay=0.1)
    changed = dataclasses.replace(config, max_steps=4, optim=optim)
    message = r"optim.learning_rate \(0.001 -> 1e-09\), optim.weight_decay \(0.0 -> 0.1\)"
    with pytest.raises(InputError, match=message):
        train(changed, resume=True)
    with pytest.raises(InputError, match=r"--allow-change optim.weight_decay"):
        train(changed, resume=True, allow_change=["optim.learning_rate"])
    with pytest.raises(InputError, match=r"did you mean .optim.weight_decay"):
        train(changed, resume=True, allow_change=["optim.weight_decai"])
    train(changed, resume=True, allow_change=["optim"])
    assert [row["learning_rate"] for row in steps(tmp_path / "run")] == [1e-3, 1e-3, 1e-9, 1e-9]


def test_two_processes_do_not_write_one_run(tmp_path):
    config = tiny_config(tmp_path / "run", max_steps=1)
    train(config)
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing to"):
            train(config, overwrite=True)
    assert (tmp_path / "run" / "summary.json").exists()
    train(config, overwrite=True)
