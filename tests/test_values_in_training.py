"""Values that are found while a run trains: greedy completions, and rates of success."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import pytest
import torch

from fastrl.assembly import build_trainer
from fastrl.config import RolloutConfig
from fastrl.errors import InputError
from fastrl.phase_clock import PhaseClock
from fastrl.run import train
from fastrl.types import Rollouts
from fastrl.values.fingerprint import value_keys
from fastrl.values.kinds import SuccessRates, success_rates
from fastrl.values.success_rates import Estimate, drifts, updated
from tests.helpers import random_rollouts, tiny_policy
from tests.test_astar_po import assert_same_end, with_saves
from tests.test_training import numbers
from tests.test_values import astar_config, write_task

SETTINGS = success_rates()


def spo_config(tmp_path, **changes):
    """A run on 9 prompts of a file, 3 a step."""
    config = astar_config(
        tmp_path, method="spo_single_stream", task=write_task(tmp_path / "data.jsonl", 11),
        task_args={}, rewards=(f"{tmp_path / 'length.py'}:even",),
    )  # fmt: skip
    (tmp_path / "length.py").write_text(
        "def even(completions):\n    return [float(len(c) % 2 == 0) for c in completions]\n"
    )
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("num_generations", [1, 4])
def test_remax_subtracts_what_the_greedy_completion_scores(tmp_path, num_generations):
    rollout = RolloutConfig(num_generations, max_prompt_length=48, max_completion_length=5)
    config = astar_config(tmp_path, method="remax", rollout=rollout)
    trainer = build_trainer(config)
    for step in range(2):
        scored = trainer.sample(step, PhaseClock()).trained
        prompts = scored.rollouts.prompts
        expected = []
        for ids, example in zip(prompts.token_ids, prompts.examples, strict=True):
            completion = greedy(trainer.policy, ids, 5)
            alone = Rollouts(
                prompts=trainer.encode([example]), completion_ids=(completion,),
                rollout_logps=None, finished=torch.ones(1, dtype=torch.bool),
            )  # fmt: skip
            text = trainer.policy.tokenizer.decode(completion, skip_special_tokens=True)
            reward = float(trainer.sampler.scorer.score(alone, [text]).total)
            expected += [reward] * num_generations
        inputs = trainer.inputs(scored.rollouts, scored.rewards, step)
        assert inputs.baselines.tolist() == pytest.approx(expected, abs=1e-7)
        with torch.no_grad():  # other weights, other answers
            trainer.policy.lm_head.weight.roll(1, 0)
    train(config)
    rows = [row for row in numbers(tmp_path / "run") if "loss" in row]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert all(0 <= row["values/greedy_reward"] <= 2 for row in rows)


@torch.no_grad()
def greedy(policy, ids, limit: int):
    start = len(ids)
    while len(ids) - start < limit:
        token = policy.model(input_ids=ids[None]).logits[0, -1].argmax()
        ids = torch.cat([ids, token[None]])
        if int(token) in policy.eos_token_ids:
            break
    return ids[start:]


def test_the_estimate_is_the_published_one():
    """Numbers of OBJECTIVES: 3 of 8 solved, then one success after the policy moved."""
    start = Estimate((3 + 0.5) / 9, 1 / (1 - SETTINGS.lowest))
    assert start.rate * start.weight == pytest.approx(3.111111, abs=1e-6)
    one = torch.tensor([1.0])
    for drift, rate in ((0.03, 0.465278), (0.006, 0.461088)):
        assert updated(start, one, drift, SETTINGS).rate == pytest.approx(rate, abs=1e-6)


def test_without_forgetting_the_estimate_is_a_mean():
    never = SuccessRates(0, 0.06, 1.0, 1.0, 0.05, 0)
    rewards = [1.0, 0.0, 1.0, 1.0, 0.25]
    found = Estimate(0.5, 1.0)
    for reward in rewards:
        found = updated(found, torch.tensor([reward]), 0.3, never)
    assert found.rate == pytest.approx((sum(rewards) + 0.5) / 6)
    together = updated(Estimate(0.5, 1.0), torch.tensor(rewards), 0.3, never)
    assert together == pytest.approx(found)


def test_how_far_a_policy_moved_is_the_mean_over_tokens():
    policy = tiny_policy(dtype=torch.float64)
    policy.model.requires_grad_(False)
    rollouts = random_rollouts([5, 3, 4], [[4], [1], [6]])
    generator = torch.Generator().manual_seed(3)
    logps = tuple(-torch.rand(len(ids), generator=generator) for ids in rollouts.completion_ids)
    rollouts = dataclasses.replace(rollouts, rollout_logps=logps)
    expected = []
    for prompt, ids, then in zip(
        rollouts.prompts.token_ids, rollouts.completion_ids, logps, strict=True
    ):
        logits = policy.model(input_ids=torch.cat([prompt, ids])[None]).logits[0]
        now = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(1).gather(1, ids[:, None])[:, 0]
        expected.append(float((now - then).abs().mean()))
    for budget in (100, 12):
        found = drifts(policy, rollouts, 0.7, max_tokens_per_pass=budget)
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_spo_compares_with_the_rate_before_its_reward(tmp_path):
    """Two visits of every prompt, written out from what the trainer sampled."""
    trainer = build_trainer(spo_config(tmp_path, prompts_per_step=9))
    known: dict[str, Estimate] = {}
    last: dict[str, tuple] = {}
    for step in range(3):
        output = trainer.sample(step, PhaseClock()).trained
        keys = value_keys(output.rollouts.prompts, trainer.task)
        assert len(set(keys)) == 9
        inputs = trainer.inputs(output.rollouts, output.rewards, step)
        store = trainer.sampler.values.reference.store
        for b, key in enumerate(keys):
            solved = sum(store.rewards[key])
            before = known.get(key, Estimate((solved + 0.5) / 9, 8.0))
            assert float(inputs.baselines[b]) == pytest.approx(
                before.rate, abs=1e-6
            )  # float32 logps
            drift = 0.0
            if key in last:
                prompt, ids, then = last[key]
                logits = trainer.policy.model(input_ids=torch.cat([prompt, ids])[None]).logits[0]
                now = logits[len(prompt) - 1 : -1].log_softmax(1).gather(1, ids[:, None])[:, 0]
                drift = float((now - then).abs().mean().detach())
            rho = min(max(2 ** (-drift / 0.06), 0.875), 0.96)
            alpha = rho * before.rate * before.weight + float(output.rewards.total[b])
            weight = rho * before.weight + 1
            known[key] = Estimate(alpha / weight, weight)
            last[key] = (
                output.rollouts.prompts.token_ids[b], output.rollouts.completion_ids[b],
                output.rollouts.rollout_logps[b],
            )  # fmt: skip
            found = trainer.sampler.stream.tracked[key]
            assert found["rate"] == pytest.approx(known[key].rate, abs=1e-6)
        with torch.no_grad():  # as an update would
            trainer.policy.model.model.norm.weight *= 1.08
    assert len({round(one.weight, 6) for one in known.values()}) > 1, "drifts differ"


def test_prompts_are_drawn_by_how_uncertain_they_are(tmp_path):
    config = spo_config(tmp_path, prompts_per_step=1)
    trainer = build_trainer(config)
    values, stream = trainer.sampler.values, trainer.sampler.stream
    values.prepare()
    for place, key in enumerate(values.keys):
        stream.tracked[key] = {"rate": place / 8, "weight": 1.0, "ids": [], "logps": []}
    weights = [math.sqrt(place / 8 * (1 - place / 8)) + 0.05 for place in range(9)]
    num = 20_000
    drawn = Counter(values.choose(1, cursor)[0] for cursor in range(num))
    for place, weight in enumerate(weights):
        share = weight / sum(weights)
        error = 4 * math.sqrt(share * (1 - share) / num)
        assert drawn[values.indices[place]] / num == pytest.approx(share, abs=error)
    assert values.choose(4, 7) == values.choose(4, 7)
    assert sorted(values.choose(9, 3)) == sorted(values.indices)
    with pytest.raises(InputError, match="asks 10 different prompts but there are 9"):
        values.choose(10, 0)


@pytest.mark.parametrize("method", ["spo_single_stream", "remax"])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, method):
    config = spo_config(tmp_path, method=method, max_steps=6)
    whole = with_saves(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    whole = dataclasses.replace(whole, warm_start=config.warm_start)
    train(whole)
    parted = dataclasses.replace(whole, output_dir=str(tmp_path / "parted"))
    train(dataclasses.replace(parted, max_steps=3))
    train(parted, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parted")
    states = [
        json.loads((tmp_path / name / "checkpoint-6/trainer_state.json").read_text())["prompts"]
        for name in ("whole", "parted")
    ]
    assert states[0] == states[1]
    assert ("tracked" in states[0]) == (method == "spo_single_stream")


def test_so_many_prompts_of_an_endless_task(tmp_path):
    config = astar_config(tmp_path, method="spo_single_stream")
    trainer = build_trainer(config)
    trainer.sampler.values.prepare()
    assert set(trainer.sampler.values.indices) <= set(range(12))
    assert len(trainer.sampler.values.keys) == 11  # a prompt comes twice
    objective = {"parameters": {"num_prompts": 20, "num_samples": 0}}
    config = dataclasses.replace(config, objective=objective)
    train(config)
    rows = [row for row in numbers(tmp_path / "run") if "loss" in row]
    assert rows[0]["values/expected_reward"] == 0.5
    assert len(list((tmp_path / "values").iterdir())) == 1  # of the trainer before
    trainer = build_trainer(config)
    trainer.sampler.values.prepare()
    assert set(trainer.sampler.values.indices) <= set(range(20))
