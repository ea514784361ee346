"""Rewards that are no finite numbers: the step is left out, counted, and too many end the run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrl.assembly import build_trainer
from fastrl.config import Config, DataConfig, EvalConfig, SaveConfig
from fastrl.controllers import RunningRewards
from fastrl.errors import InputError, NotFiniteError
from fastrl.learner import MAX_SKIPPED
from fastrl.rewards import RewardPool
from fastrl.rewards.score import LARGEST, NotFiniteReward, checked, weighted_total
from fastrl.run import train
from fastrl.types import Example, Rewards
from tests.helpers import checksum
from tests.test_dynamic_sampling import assert_same_end, killed_after, steps_of
from tests.test_training import tiny_config
from tests.test_update import same, state_of


def first_number(prompt: str) -> int:
    return int(re.search(r"\d+", prompt)[0])


def now_and_then(prompts, completions):
    """No number for completions of a prompt in five."""
    found = checksum(prompts, completions)
    return [
        math.nan if first_number(p) % 5 == 0 else r for p, r in zip(prompts, found, strict=True)
    ]


def config_of(directory: Path, reward: str = "now_and_then", **changes) -> Config:
    """A run with steps of both kinds, whose held-out prompt and first prompt have rewards."""
    given = {
        "rewards": (f"{__file__}:{reward}", "task"), "max_steps": 6, "prompts_per_step": 2,
        "data": DataConfig(eval_size=1), "eval": EvalConfig(num_samples=1),
        "save": SaveConfig(save_steps=1, save_total_limit=99, completions_per_step=99),
    }  # fmt: skip
    return tiny_config(directory, **{**given, **changes})


@pytest.mark.parametrize(
    ("value", "shown"),
    [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (1e39, r"1e\+39")],
)
def test_a_score_that_is_not_finite_is_named_and_the_others_are_kept(value, shown):
    examples = [Example("first"), Example("second"), Example("third")]
    scores = {"good": [1.0, None, 3.0], "bad": [None, value, 0.5]}
    with pytest.raises(
        NotFiniteReward,
        match=rf"^the reward 'bad' gave {shown} for a completion of the prompt 'second'$",
    ) as caught:
        weighted_total(examples, scores, [2.0, -1.0])
    rewards = caught.value.rewards
    assert rewards.total.tolist() == [2.0, 0.0, 5.5]
    assert rewards.parts["bad"].tolist()[1:] == [math.inf, 0.5]
    assert rewards.parts["bad"][:1].isnan()  # it did not apply
    assert rewards.is_finite.tolist() == [True, False, True]
    assert caught.value.num_scores == 1
    with pytest.raises(NotFiniteReward, match="1 recorded scores"):
        checked(rewards)


def test_a_sum_that_is_too_large_is_refused_before_it_is_formed():
    examples = [Example("first"), Example("second")]
    for scores, weights in (
        ({"a": [LARGEST, 0.0], "b": [LARGEST, 0.0]}, [1.0, 1.0]),
        ({"a": [1e30, 0.0]}, [1e10]),
        ({"a": [-LARGEST, 0.0], "b": [-1e38, 0.0]}, [0.9, 1.0]),
    ):
        with pytest.raises(NotFiniteReward, match="of the prompt 'first'"):
            weighted_total(examples, scores, weights)
    fits = weighted_total(examples, {"a": [8e37, -8e37], "b": [6e37, -6e37]}, [1.0, 1.0])
    assert torch.isfinite(fits.total).all()


def test_several_are_counted_and_the_first_is_named():
    scores = {"a": [1.0, math.nan], "b": [math.inf, 0.0]}
    with pytest.raises(NotFiniteReward, match=r"'a' gave nan .* 'second', and 1 more are no fin"):
        weighted_total([Example("first"), Example("second")], scores, [1.0, 1.0])


def test_none_still_says_that_a_reward_does_not_apply():
    found = weighted_total([Example("x")], {"a": [None], "b": [2.0]}, [1.0, 1.0])
    assert found.total.tolist() == [2.0]
    assert checked(found) is found
    with pytest.raises(InputError, match="no reward applies"):
        weighted_total([Example("x")], {"a": [None]}, [1.0])


def test_a_pool_says_the_same_and_goes_on():
    with RewardPool([f"{__file__}:now_and_then"], None, None, num_workers=1, timeout_s=60) as pool:
        for prompt in ("11 + 2", "10 + 2"):
            example = Example(prompt)
            for row in range(2):
                pool.submit(row, example, "some text", [1], num_generations=2)
            if prompt.startswith("11"):
                expected = checksum([prompt], ["some text"])[0]
                assert pool.collect().total.tolist() == pytest.approx([expected] * 2)
                continue
            message = "'now_and_then' gave nan .* the prompt '10 \\+ 2', and 1 more"
            with pytest.raises(NotFiniteReward, match=message) as caught:
                pool.collect()
            assert caught.value.num_scores == 2
        with pytest.raises(InputError, match="gave nan"):
            pool.check(Example("5 + 5", answer="10"))


def bad_steps(run: Path) -> list[int]:
    """Steps of which a prompt had no reward, by what was logged of them."""
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    found = {row["step"] for row in rows if first_number(row["prompt"]) % 5 == 0}
    for row in rows:
        assert (row["reward"] is None) == (first_number(row["prompt"]) % 5 == 0)
    return sorted(found)


def test_a_step_without_rewards_is_left_out_and_counted(tmp_path, capsys):
    run = tmp_path / "whole"
    config = config_of(run)
    train(config)
    rows, bad = steps_of(run), bad_steps(run)
    assert 0 < len(bad) < 6
    for row in rows:
        is_bad = row["step"] in bad
        assert row["skipped/non_finite"] == float(is_bad)
        assert (row["rewards/non_finite"] > 0) == is_bad
        assert (row["grad_norm"] > 0) == (not is_bad)
        assert row["learning_rate"] == 1e-3
        step = row["step"]
        before, after = (
            load_file(run / f"checkpoint-{number}" / "model.safetensors")
            for number in (step - 1, step)
        )
        assert all(torch.equal(before[key], after[key]) for key in before) == is_bad
    said = capsys.readouterr().out.splitlines()
    for step in bad:
        (line,) = [text for text in said if text.startswith(f"step {step}: the reward")]
        assert "the reward 'now_and_then' gave nan for a completion of the prompt '" in line
        assert line.endswith("; the step is left out")
    killed_after(bad[0], run, tmp_path / "killed")
    train(dataclasses.replace(config, output_dir=str(tmp_path / "killed")), resume=True)
    assert_same_end(run, tmp_path / "killed")


def spoil(trainer, *steps: int) -> None:
    """In these calls of the scorer, from 0, one completion's score is no number."""
    score, calls = trainer.sampler.scorer.score, []

    def spoilt(rollouts, texts):
        rewards = score(rollouts, texts)
        calls.append(1)
        if len(calls) - 1 not in steps:
            return rewards
        parts = {name: part.tolist() for name, part in rewards.parts.items()}
        parts["checksum"][1] = math.nan
        return weighted_total([Example("spoilt")] * len(texts), parts, [1.0] * len(parts))

    trainer.sampler.scorer.score = spoilt


def trainer_of(method: str = "grpo", objective=None, **changes):
    return build_trainer(tiny_config("unused", method=method, objective=objective or {}, **changes))


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("grpo", {}),
        ("ppo", {"reward_shaping": "none"}),
        ("ppo_max", {"token_reward_shaping": "none", "parameters": {"critic_warmup_steps": 0}}),
        ("scalerl", {"parameters": {"max_thinking_tokens": 0}}),
        ("entropy_adaptive", {}),
    ],
)
def test_nothing_moves_and_training_goes_on(method, objective):
    trainer = trainer_of(method, objective)
    spoil(trainer, 1)
    trainer.train_step(0)
    before, controllers = state_of(trainer), trainer.adaptation.state_dict()
    history = dict(trainer.sampler.stream.history)
    output = trainer.train_step(1)
    assert (
        "the reward 'checksum' gave nan for a completion of the prompt 'spoilt'" in output.problem
    )
    assert output.metrics["skipped/non_finite"] == output.metrics["rewards/non_finite"] == 1
    assert output.metrics["loss"] == output.metrics["grad_norm"] == 0
    assert same(before, state_of(trainer))
    assert trainer.adaptation.state_dict() == controllers
    assert trainer.sampler.stream.history == history
    assert trainer.learner.skipped_in_a_row == 1
    output = trainer.train_step(2)
    assert output.problem is None
    assert output.metrics["skipped/non_finite"] == output.metrics["rewards/non_finite"] == 0
    assert not same(before, state_of(trainer))
    assert trainer.learner.skipped_in_a_row == 0


def test_running_statistics_never_see_them():
    """What would have been refused if it had come this far."""
    with pytest.raises(ValueError, match="finite rewards"):
        RunningRewards().update(torch.tensor([1.0, math.inf]))
    with pytest.raises(ValueError, match="total must be finite"):
        Rewards(torch.tensor([math.nan]), {})


def test_dynamic_sampling_samples_no_more_for_a_step_that_is_lost():
    trainer = trainer_of("dapo", {"parameters": {"cache": 2.0}})
    trainer.train_step(0)
    spoil(trainer, 0)
    before = state_of(trainer)
    output = trainer.train_step(1)
    assert output.sampled.num_rounds == 1
    assert output.metrics["skipped/non_finite"] == 1
    assert same(before, state_of(trainer))


def test_greedy_completions_without_a_score_cost_the_step_too():
    trainer = trainer_of("remax", {"reward_shaping": "none"})
    trainer.train_step(0)
    spoil(trainer, 1)  # 0 is what was sampled, 1 its baselines
    before = state_of(trainer)
    output = trainer.train_step(1)
    assert output.metrics["skipped/non_finite"] == 1
    everything = output.sampled.everything  # with the rewards that there are
    assert len(everything.rewards.total) == len(everything.texts)
    assert same(before, state_of(trainer))
    assert trainer.train_step(2).metrics["skipped/non_finite"] == 0


def test_partial_rollouts_drop_the_groups_that_had_none():
    config = tiny_config("unused", objective={"rollout_correction": "truncated_tokens"})
    rollout = dataclasses.replace(config.rollout, max_tokens_per_step=24)
    trainer = build_trainer(dataclasses.replace(config, rollout=rollout))
    spoil(trainer, 0)
    problems = [trainer.train_step(step).problem for step in range(8)]
    assert sum(problem is not None for problem in problems) == 1
    first = next(step for step, problem in enumerate(problems) if problem is not None)
    assert any(problem is None for problem in problems[first:])


def test_a_recording_is_replayed_with_the_steps_that_were_left_out(tmp_path):
    config = config_of(tmp_path / "run")
    train(config, save_rollouts=tmp_path / "saved")
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    train(again, replay_rollouts=tmp_path / "saved")
    assert_same_end(tmp_path / "run", tmp_path / "again")


def test_an_evaluation_without_rewards_ends_the_run_with_a_checkpoint(tmp_path):
    """It is no step that could be left out."""
    source = tmp_path / "reward.py"
    shutil.copy(Path(__file__).parent / "helpers.py", source)
    with source.open("a") as file:
        file.write("\n\ndef grades(prompts, completions):\n    return [1.0] * len(completions)\n")
    config = config_of(tmp_path / "run", max_steps=2)
    config = dataclasses.replace(config, rewards=(f"{source}:grades",))
    train(config)
    text = source.read_text().replace(
        "[1.0] *", "[float('nan') if len(completions) < 2 else 1.0] *"
    )
    source.write_text(text)
    longer = dataclasses.replace(config, max_steps=3)
    with pytest.raises(InputError, match="'grades' gave nan"):
        train(longer, resume=True)


def test_ten_in_a_row_end_the_run_and_the_batch_is_kept(tmp_path):
    trainer = trainer_of()
    spoil(trainer, *range(20))
    before = state_of(trainer)
    for step in range(MAX_SKIPPED - 1):
        assert trainer.train_step(step).metrics["skipped/non_finite"] == 1
    with pytest.raises(
        NotFiniteError, match=r"10 updates in a row were not finite .*'checksum' gave nan.*mend the"
    ):
        trainer.train_step(MAX_SKIPPED - 1)
    assert same(before, state_of(trainer))


def test_a_run_that_ends_so_leaves_its_batch_and_no_later_checkpoint(tmp_path):
    run = tmp_path / "run"
    task_args = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    source = tmp_path / "reward.py"
    source.write_text(
        "from pathlib import Path\n"
        "HERE = Path(__file__).parent\n"
        "def late(prompts, completions):\n"
        "    training = (HERE / 'run' / 'checkpoint-0').exists()\n"
        "    return [float('-inf') if training else 1.0 for _ in completions]\n"
    )
    config = config_of(run, max_steps=20, rewards=(f"{source}:late",), task_args=task_args)
    with pytest.raises(NotFiniteError, match=r"'late' gave -inf .* the last batch is in .*not_fin"):
        train(config)
    rows = steps_of(run)
    assert [row["skipped/non_finite"] for row in rows] == [1.0] * (MAX_SKIPPED - 1)
    checkpoints = {path.name for path in run.glob("checkpoint-*")}
    assert f"checkpoint-{MAX_SKIPPED}" not in checkpoints
    saved = load_file(run / "not_finite" / "batch.safetensors")
    assert torch.isinf(saved["rewards/late"]).all()
    lines = (run / "not_finite" / "completions.jsonl").read_text().splitlines()
    assert len(lines) == len(saved["completion_lengths"])
    assert all(json.loads(line)["rewards"] == {"late": "not finite"} for line in lines)
