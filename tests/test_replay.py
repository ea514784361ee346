"""Rollouts that a run has saved: trained on again to the same bits, and scored once more."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl.cli import main
from fastrl.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    RolloutConfig,
    SaveConfig,
    WarmStartConfig,
)
from fastrl.config_io import save_config
from fastrl.errors import InputError
from fastrl.replay import Replay
from fastrl.report import read_metrics
from fastrl.rescore import rescore
from fastrl.rollout.native import NativeEngine
from fastrl.run import train
from fastrl.vstar import run_vstar
from tests.test_dynamic_sampling import config_of as dynamic_config
from tests.test_dynamic_sampling import numbered_prompts
from tests.test_partial_rollouts import config_of as partial_config
from tests.test_training import TIMES, assert_same_run, tiny_config


def small(directory: Path, **changes):
    config = tiny_config(directory, max_steps=3)
    given = {
        "rewards": config.rewards[::-1],  # "task" first: the order is not that of the alphabet
        "data": DataConfig(eval_size=2), "eval": EvalConfig(num_samples=1),
        "warm_start": dataclasses.replace(config.warm_start, steps=2),
    }  # fmt: skip
    return dataclasses.replace(config, **{**given, **changes})


def truncated(directory: Path):
    """Log-probabilities of what was drawn from are recorded too."""
    rollout = RolloutConfig(
        num_generations=4, max_prompt_length=48, max_completion_length=5, top_p=0.9
    )
    return small(directory, rollout=rollout)


def dynamic_with_baselines(directory: Path):
    """Greedy completions in each of several rounds."""
    config = dynamic_config(directory, "seldom", max_steps=3)
    objective = {**config.objective, "advantage": "baseline_centred"}
    return dataclasses.replace(config, objective=objective)


@pytest.fixture
def sampled(monkeypatch):
    """The labels of what the engine is asked while the test runs: samples, by their number."""
    asked: list[int] = []
    advance = NativeEngine.advance

    def advance_and_count(self, prompts, sampling, generator, **options):
        asked.append(sampling.num_generations)
        return advance(self, prompts, sampling, generator, **options)

    monkeypatch.setattr(NativeEngine, "advance", advance_and_count)
    return asked


@pytest.mark.parametrize(
    "make",
    [
        small,
        truncated,
        lambda directory: small(directory, method="dppo_tv"),
        lambda directory: dynamic_config(directory, "seldom", max_steps=3),
        lambda directory: partial_config(directory, max_steps=6),
        lambda directory: small(directory, objective={"max_pass_rate": 0.4}),
        lambda directory: small(directory, method="remax"),
        lambda directory: dynamic_with_baselines(directory),
        lambda directory: small(directory, method="astar_po"),
        lambda directory: small(directory, method="spo_single_stream"),
    ],
    ids=[
        "plain",
        "truncated",
        "ratio_to_sampler",
        "dynamic",
        "partial",
        "solved",
        "greedy",
        "greedy_dynamic",
        "reference",
        "tracked",
    ],
)
def test_a_replayed_run_is_the_run_that_was_saved(tmp_path, sampled, make):
    """The same weights, metrics and completions; the engine only answers held-out prompts."""
    config = make(tmp_path / "first")
    train(config, save_rollouts=tmp_path / "saved")
    del sampled[:]
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    train(again, replay_rollouts=tmp_path / "saved")
    assert sampled == [config.eval.num_samples] * 2  # before and after
    assert_same_run(tmp_path / "first", tmp_path / "again")
    last = [tmp_path / x / f"checkpoint-{config.max_steps}" for x in ("first", "again")]
    states = [json.loads((path / "trainer_state.json").read_text()) for path in last]
    assert states[0]["prompts"] == states[1]["prompts"]


def test_a_step_on_disk_holds_all_that_was_sampled(tmp_path):
    config = small(tmp_path / "run", save=SaveConfig(completions_per_step=99))
    train(config, save_rollouts=tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "recording.json", "step-1", "step-2", "step-3",
    ]  # fmt: skip
    shown = [json.loads(x) for x in (tmp_path / "run/completions.jsonl").read_text().splitlines()]
    for step in (1, 2, 3):
        path = tmp_path / "saved" / f"step-{step}"
        lines = [json.loads(x) for x in (path / "completions.jsonl").read_text().splitlines()]
        same = ("prompt", "completion", "answer", "reward", "rewards", "finished")
        assert [{k: line[k] for k in same} for line in lines] == [
            {k: row[k] for k in same} for row in shown if row["step"] == step
        ]
        tensors = load_file(path / "rollouts.safetensors")
        assert len(tensors["0.rollout_logps"]) == int(tensors["0.completion_lengths"].sum())
        # Two warm-start steps have taken eight examples each.
        assert tensors["0.indices"].tolist() == [16 + 3 * (step - 1) + p for p in range(3)]


def test_rewards_come_back_in_the_order_of_the_run(recording):
    assert list(Replay(recording).rounds(0)[0].rewards.parts) == ["task", "checksum"]


def test_prompts_that_were_passed_over_do_not_shift_those_that_were_asked(tmp_path):
    task = numbered_prompts(tmp_path / "data.jsonl", 10)
    config = small(
        tmp_path / "run", max_steps=8, task=task, task_args={},
        rewards=(f"{Path(__file__).parent / 'test_dynamic_sampling.py'}:easy_ones",),
        objective={"max_pass_rate": 0.9}, warm_start=WarmStartConfig(),
    )  # fmt: skip
    train(config, save_rollouts=tmp_path / "saved")
    asked = [index for step in range(8) for index in indices_of(tmp_path / "saved", step)]
    assert asked != list(range(8 * 3))
    found = rescore(config, tmp_path / "saved")  # which compares the prompts
    assert found.now == found.recorded


def indices_of(saved: Path, step: int) -> list[int]:
    return Replay(saved).rounds(step)[0].tensors["indices"].tolist()


def test_a_killed_run_saves_the_rest_and_a_killed_replay_goes_on(tmp_path):
    config = small(tmp_path / "whole", save=SaveConfig(save_steps=1, save_total_limit=9))
    train(config, save_rollouts=tmp_path / "saved")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.copytree(tmp_path / "saved", tmp_path / "parted")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "killed" / f"checkpoint-{step}")
    shutil.rmtree(tmp_path / "parted" / "step-3")
    (tmp_path / "parted" / ".partial-step-3").mkdir()  # as if it had died while writing
    killed = dataclasses.replace(config, output_dir=str(tmp_path / "killed"))
    train(killed, resume=True, save_rollouts=tmp_path / "parted")
    for name in ("rollouts.safetensors", "completions.jsonl"):
        for step in (1, 2, 3):
            paths = [tmp_path / x / f"step-{step}" / name for x in ("saved", "parted")]
            assert paths[0].read_bytes() == paths[1].read_bytes()
    assert not list((tmp_path / "parted").glob(".partial*"))
    for step in (2, 3):
        shutil.rmtree(tmp_path / "killed" / f"checkpoint-{step}")
    train(killed, resume=True, replay_rollouts=tmp_path / "saved")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A run of three steps with what it sampled."""
    directory = tmp_path_factory.mktemp("recording")
    train(small(directory / "run"), save_rollouts=directory / "saved")
    return directory / "saved"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts_per_step": 2}, "recorded with prompts_per_step = 3, but this run has 2"),
        (
            {"rollout": RolloutConfig(num_generations=2, max_prompt_length=48,
                                      max_completion_length=5)},
            r"with rollout\.num_generations = 4, but this run has 2",
        ),
        (
            {"rollout": RolloutConfig(num_generations=4, max_prompt_length=48,
                                      max_completion_length=5, temperature=0.5)},
            r"with rollout\.temperature = 1\.0, but this run has 0\.5",
        ),
        ({"rewards": ("task",)}, "with rewards = "),
        ({"max_steps": 5}, "has no rollouts of step 4, and max_steps is 5"),
        (
            {"model": ModelConfig(
                architecture={**small("").model.architecture, "vocab_size": 280})},
            "with another tokenizer or vocabulary",
        ),
        (
            {"task_args": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}},
            "with another tokenizer|recorded with other prompts than",
        ),
        ({"warm_start": WarmStartConfig()}, "recorded with other prompts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, recording, changes, message):
    config = small(tmp_path / "run", **changes)
    with pytest.raises(InputError, match=message):
        train(config, replay_rollouts=recording)


def test_another_method_may_train_on_the_same_rollouts(tmp_path, recording):
    train(small(tmp_path / "run", method="dr_grpo"), replay_rollouts=recording)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    first = load_file(recording / "step-1" / "rollouts.safetensors")["0.reward"]
    assert rows[0]["reward"] == float(first.double().mean())


def test_another_round_than_was_recorded_is_an_error(tmp_path, recording):
    never = {"selection.lowest": 0.98, "selection.highest": 0.99}
    objective = {"selection": "pass_window", "dynamic_sampling": True, "parameters": never}
    config = small(tmp_path / "run", objective=objective)
    with pytest.raises(InputError, match="was recorded in 1 rounds of sampling"):
        train(config, replay_rollouts=recording)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("remax", "recorded without the rewards of greedy completions"),
        ("astar_po", "and a replay samples nothing; run fastrl vstar with .*, then replay"),
    ],
)
def test_what_was_not_sampled_then_is_not_sampled_now(
    tmp_path, recording, sampled, method, message
):
    config = small(tmp_path / "run", method=method)
    with pytest.raises(InputError, match=message):
        train(config, replay_rollouts=recording)
    assert set(sampled) == {config.eval.num_samples}
    if method == "astar_po":
        run_vstar(config)
        train(config, replay_rollouts=recording, overwrite=True)


def test_steps_that_are_broken_or_changed_are_errors(tmp_path, recording):
    saved = tmp_path / "saved"
    shutil.copytree(recording, saved)
    config = small(tmp_path / "run")
    lines = (saved / "step-1" / "completions.jsonl").read_text()
    changed = json.loads(lines.split("\n")[0])["completion"]
    (saved / "step-1" / "completions.jsonl").write_text(
        lines.replace(json.dumps(changed, ensure_ascii=False), '"never said"', 1)
    )
    with pytest.raises(InputError, match="step 1 have other texts than were recorded"):
        train(config, replay_rollouts=saved)
    (saved / "step-1" / "rollouts.safetensors").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"cannot read the rollouts in .*step-1"):
        train(config, overwrite=True, replay_rollouts=saved)
    (saved / "recording.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="not of format 1"):
        train(config, overwrite=True, replay_rollouts=saved)
    with pytest.raises(InputError, match="holds no recorded rollouts"):
        train(config, overwrite=True, replay_rollouts=tmp_path)


def test_a_recording_is_not_written_over(tmp_path, recording):
    saved = tmp_path / "saved"
    shutil.copytree(recording, saved)
    config = small(tmp_path / "run", max_steps=1)
    with pytest.raises(InputError, match="already holds recorded rollouts; give --overwrite"):
        train(config, save_rollouts=saved)
    assert not (tmp_path / "run").exists()
    train(config, overwrite=True, save_rollouts=saved)
    assert Replay(saved).steps() == [0]
    other = dataclasses.replace(config, output_dir=str(tmp_path / "other"), prompts_per_step=2)
    train(other)
    with pytest.raises(InputError, match="holds the rollouts of another run"):
        train(dataclasses.replace(other, max_steps=2), resume=True, save_rollouts=saved)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="exists and holds no recorded rollouts"):
        train(config, overwrite=True, save_rollouts=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def mean_of(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.parametrize("make", [small, partial_config], ids=["plain", "partial"])
def test_scoring_again_gives_the_metrics_of_the_run(tmp_path, make):
    config = make(tmp_path / "run")
    train(config, save_rollouts=tmp_path / "saved")
    found = rescore(config, tmp_path / "saved")
    rows = [row for row in read_metrics(tmp_path / "run") if "reward" in row]
    assert found.steps == [row["step"] for row in rows]
    assert found.recorded == found.now
    for row, metrics in zip(rows, found.now, strict=True):
        assert {name: row[name] for name in metrics} == metrics
    table = dict(found.rows)
    assert table["reward"][0] == table["reward"][1] == pytest.approx(mean_of(rows, "reward"))
    assert not any(word in name for name in table for word in TIMES)


def test_scoring_with_another_reward_on_the_command_line(tmp_path, recording, capsys):
    (tmp_path / "length.py").write_text(
        "def length(prompts, completions, answer):\n"
        "    assert all(answer)\n"
        "    return [float(len(completion)) for completion in completions]\n"
    )
    save_config(small(tmp_path / "unused"), tmp_path / "config.toml")
    words = ["score", str(tmp_path / "config.toml"), "--replay-rollouts", str(recording)]
    flags = ["--rewards", f"{tmp_path / 'length.py'}:length", "--json", str(tmp_path / "out.json")]
    assert main([*words, *flags]) == 0
    texts = [
        json.loads(line)["completion"]
        for step in (1, 2, 3)
        for line in (recording / f"step-{step}/completions.jsonl").read_text().split("\n")
        if line
    ]
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["num_completions"] == len(texts) == 36
    now = [step["now"]["reward"] for step in record["steps"]]
    assert sum(now) / 3 == pytest.approx(sum(map(len, texts)) / 36)
    shown = capsys.readouterr().out
    assert "36 completions of 3 steps" in shown
    assert "rewards/length/mean" in shown
    assert "rewards/checksum/mean" in shown
    assert not (tmp_path / "unused").exists()


def test_scoring_refuses_another_task(tmp_path, recording):
    with pytest.raises(InputError, match="give the same task and seed"):
        rescore(small(tmp_path / "run", seed=3), recording)


def test_nothing_scored_yet_is_said(tmp_path, recording):
    saved = tmp_path / "saved"
    shutil.copytree(recording, saved)
    for step in (1, 2, 3):
        path = saved / f"step-{step}"
        tensors = load_file(path / "rollouts.safetensors")
        tensors["0.scored_prompts"] = torch.zeros(0, dtype=torch.int64)
        save_file(tensors, path / "rollouts.safetensors")
        (path / "completions.jsonl").write_text("")
    with pytest.raises(InputError, match="no completions that had been scored"):
        rescore(small(tmp_path / "run"), saved)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "CONFIG", "--save-rollouts", "a", "--replay-rollouts", "b"], "exclude each"),
        (["train", "CONFIG", "--replay-rollouts", "nowhere"], "nowhere holds no recorded rollouts"),
        (["train", "CONFIG", "--save-rollouts"], "--save-rollouts needs a value"),
        (["score", "CONFIG"], "--replay-rollouts DIR"),
        (["score", "--replay-rollouts", "b"], "give a run directory or a config"),
        (["score", "CONFIG", "--replay-rollouts", "nowhere"], "nowhere holds no recorded"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, words, message):
    save_config(small(tmp_path / "run"), tmp_path / "config.toml")
    words = [str(tmp_path / "config.toml") if word == "CONFIG" else word for word in words]
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1
