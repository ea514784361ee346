"""Prompts that are replaced and prompts that leave, in whole runs and through checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrl.config import Config, DataConfig, EvalConfig, SaveConfig
from fastrl.errors import InputError
from fastrl.run import train
from tests.test_training import numbers, tiny_config, weights

SHORT = {"cache": 2.0}


def seldom(prompts: list[str], completions: list[str]) -> list[float]:
    """One in five completions is right, so that about half of the groups are wrong as a whole."""
    return [float(sum(map(ord, completion)) % 5 == 0) for completion in completions]


def never(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def easy_ones(prompts: list[str], completions: list[str]) -> list[float]:
    """Every completion of an even problem is right; of others, one in five."""
    right = seldom(prompts, completions)
    return [1.0 if int(p.split()[0]) % 2 == 0 else r for p, r in zip(prompts, right, strict=True)]


def config_of(directory: Path, reward: str, **changes) -> Config:
    objective = {"parameters": SHORT}
    given = {
        "method": "dapo", "rewards": (f"{__file__}:{reward}",), "objective": objective,
        "data": DataConfig(eval_size=2), "eval": EvalConfig(num_samples=1),
        "save": SaveConfig(save_steps=1, save_total_limit=99),
    }  # fmt: skip
    return tiny_config(directory, **{**given, **changes})


def steps_of(directory: Path) -> list[dict[str, float]]:
    return [row for row in numbers(directory) if "loss" in row]


def killed_after(step: int, run: Path, copy: Path) -> None:
    """The run as a process left it that was killed some steps after this checkpoint."""
    shutil.copytree(run, copy)
    for path in copy.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)


def assert_same_end(first: Path, second: Path) -> None:
    assert steps_of(first) == steps_of(second)
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name
    assert (first / "completions.jsonl").read_text() == (second / "completions.jsonl").read_text()


def test_prompts_are_replaced_and_a_killed_run_goes_on_with_the_same_ones(tmp_path):
    config = config_of(tmp_path / "whole", "seldom", max_steps=5)
    train(config)
    rows = steps_of(tmp_path / "whole")
    sampled = [int(row["dynamic_sampling/sampled_prompts"]) for row in rows]
    assert max(row["dynamic_sampling/rounds"] for row in rows) > 1
    assert all(row["dynamic_sampling/missing_prompts"] == 0 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert all(row["advantages/zero_fraction"] == 0 for row in rows)
    state = json.loads((tmp_path / "whole/checkpoint-5/trainer_state.json").read_text())
    assert state["prompts"]["cursor"] == 6 * 8 + sum(sampled)
    assert sum(sampled) > 5 * config.prompts_per_step
    killed_after(2, tmp_path / "whole", tmp_path / "killed")
    train(dataclasses.replace(config, output_dir=str(tmp_path / "killed")), resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_step_that_cannot_be_filled_says_so_once_and_trains_on_the_rest(tmp_path, capsys):
    config = config_of(tmp_path / "run", "seldom", max_steps=6)
    train(dataclasses.replace(config, objective={**config.objective, "max_sampling_rounds": 1}))
    rows = steps_of(tmp_path / "run")
    assert all(row["dynamic_sampling/sampled_prompts"] == 3 for row in rows)
    missing = [row["dynamic_sampling/missing_prompts"] for row in rows]
    assert any(0 < number < 3 for number in missing)
    for row, number in zip(rows, missing, strict=True):
        assert (row["grad_norm"] > 0) == (number < 3)
    assert capsys.readouterr().out.count("dynamic sampling: the selection kept") == 1


def test_a_step_that_keeps_nothing_changes_nothing(tmp_path, capsys):
    objective = {"selection": "nonzero_std", "dynamic_sampling": True}
    config = config_of(tmp_path / "run", "never", method="grpo", max_steps=2, objective=objective)
    train(config)
    for row in steps_of(tmp_path / "run"):
        assert row["dynamic_sampling/rounds"] == 10
        assert row["dynamic_sampling/missing_prompts"] == 3
        assert row["grad_norm"] == row["loss"] == row["packing/passes"] == 0
        assert row["frac_reward_zero_std"] == 1
    after = weights(tmp_path / "run")
    for name, value in load_file(tmp_path / "run/checkpoint-0/model.safetensors").items():
        assert torch.equal(value, after[name]), name
    assert "kept no prompt of 30 sampled" in capsys.readouterr().out


def numbered_prompts(path: Path, count: int) -> str:
    lines = [json.dumps({"prompt": f"{n} apples", "answer": "1"}) for n in range(count)]
    path.write_text("\n".join(lines))
    return f"jsonl:{path}"


def test_solved_prompts_leave_and_a_killed_run_remembers_them(tmp_path):
    task = numbered_prompts(tmp_path / "data.jsonl", 10)
    config = config_of(
        tmp_path / "whole", "easy_ones", max_steps=8, method="grpo", task=task, task_args={},
        objective={"max_pass_rate": 0.9},
        save=SaveConfig(save_steps=1, save_total_limit=99, completions_per_step=12),
        warm_start=dataclasses.replace(tiny_config("").warm_start, steps=0),
    )  # fmt: skip
    train(config)
    shown = [json.loads(x) for x in (tmp_path / "whole/completions.jsonl").read_text().splitlines()]
    asked = [int(row["prompt"].split()[0]) for row in shown[::4]]  # four completions of each
    assert len(asked) == 8 * 3
    held_out = {
        int(example["prompt"].split()[0])
        for example in map(json.loads, (tmp_path / "data.jsonl").read_text().splitlines())
    } - set(asked)
    even = [n for n in asked if n % 2 == 0]
    assert len(held_out) == 2
    assert len(even) == len(set(even)) > 0  # asked once, solved, gone
    assert [row["prompts/solved"] for row in steps_of(tmp_path / "whole")][-1] >= len(even)
    killed_after(3, tmp_path / "whole", tmp_path / "killed")
    train(dataclasses.replace(config, output_dir=str(tmp_path / "killed")), resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_run_that_solved_every_prompt_stops_with_a_checkpoint(tmp_path):
    lines = [json.dumps({"prompt": f"{2 * n} apples", "answer": "1"}) for n in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    config = config_of(
        tmp_path / "run", "easy_ones", method="grpo", task=f"jsonl:{tmp_path / 'data.jsonl'}",
        task_args={}, objective={"max_pass_rate": 0.9}, save=SaveConfig(),
    )  # fmt: skip
    with pytest.raises(InputError, match="nothing left to learn"):
        train(config)
    # Step 1 solves three of the four that are not held out, step 2 the fourth.
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"dynamic_sampling": True}, "nonzero_std, pass_window, but selection is none"),
        (
            {"dynamic_sampling": True, "selection": "best"},
            "nonzero_std, pass_window, but selection is best",
        ),
        (
            {
                "dynamic_sampling": True,
                "selection": "nonzero_std",
                "reward_shaping": "kl_penalised",
            },
            "needs rewards that look at no tokens",
        ),
    ],
)
def test_what_dynamic_sampling_cannot_work_with(tmp_path, objective, message):
    with pytest.raises(InputError, match=message):
        train(config_of(tmp_path / "run", "seldom", method="grpo", objective=objective))
    assert not (tmp_path / "run").exists()
