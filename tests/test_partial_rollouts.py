"""Completions that a step's token budget cuts go on in the next one, through checkpoints too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrl.assembly import build_trainer
from fastrl.carried import InFlight, begun, in_flight_from, side_by_side, staleness_metrics
from fastrl.config import Config, DataConfig, EvalConfig, SaveConfig
from fastrl.errors import InputError
from fastrl.phase_clock import PhaseClock
from fastrl.report import read_metrics
from fastrl.rollout import Sampling
from fastrl.run import train
from fastrl.trainer import Trainer
from fastrl.types import Example, Prompts, Rollouts
from tests.test_dynamic_sampling import assert_same_end, killed_after, steps_of
from tests.test_training import tiny_config

P, G, C = 3, 4, 12
LIMIT = 24
"""Tokens a step; three groups of four completions of up to twelve are at most 144."""

STOPS = tuple("abcdefghijklmnopqrstuvwxyz0123456789")
"""Completions of a policy that knows nothing end with one of these sooner or later."""


def config_of(directory: Path, **changes) -> Config:
    config = tiny_config(directory, max_steps=8)
    given = {
        "objective": {"rollout_correction": "truncated_tokens"},
        "data": DataConfig(eval_size=2), "eval": EvalConfig(num_samples=1),
        "rollout": dataclasses.replace(
            config.rollout, max_completion_length=C, max_tokens_per_step=LIMIT,
            stop_strings=STOPS,
        ),
        "warm_start": dataclasses.replace(config.warm_start, steps=2),
        "save": SaveConfig(save_steps=1, save_total_limit=99, completions_per_step=99),
    }  # fmt: skip
    return dataclasses.replace(config, **{**given, **changes})


def watched(trainer: Trainer) -> list[tuple[Rollouts, Rollouts]]:
    """What every call of `advance` began with and ended with."""
    calls: list[tuple[Rollouts, Rollouts]] = []
    advance = trainer.sampler.engine.advance

    def advance_and_note(prompts, sampling, generator, *, started, max_tokens):
        found = advance(prompts, sampling, generator, started=started, max_tokens=max_tokens)
        calls.append((started, found))
        return found

    trainer.sampler.engine.advance = advance_and_note
    return calls


def num_tokens(rollouts: Rollouts) -> int:
    return int(rollouts.lengths.sum())


def test_a_step_draws_no_more_than_its_tokens_and_carries_what_it_cut(tmp_path):
    trainer = build_trainer(config_of(tmp_path / "run"))
    calls = watched(trainer)
    num_trained = 0
    for step in range(10):
        carried = trainer.sampler.carried
        cursor = trainer.sampler.stream.cursor
        output = trainer.train_step(step)
        started, found = calls[-1]
        drawn = num_tokens(found) - num_tokens(started)
        assert 0 < drawn <= LIMIT
        # Carried groups come first, as they were, then new prompts make up the step.
        num_carried = 0 if carried is None else carried.num_prompts
        assert len(started.prompts) == P
        assert trainer.sampler.stream.cursor == cursor + P - num_carried
        if carried is not None:
            for b in range(num_carried * G):
                assert torch.equal(started.completion_ids[b], carried.rollouts.completion_ids[b])
                assert torch.equal(started.rollout_logps[b], carried.rollouts.rollout_logps[b])
        # What was drawn stays what it was, log-probabilities included.
        for b, ids in enumerate(started.completion_ids):
            assert torch.equal(found.completion_ids[b][: len(ids)], ids)
            assert torch.equal(found.rollout_logps[b][: len(ids)], started.rollout_logps[b])
        # A group is trained on once all of it has ended.
        ended = (found.finished | (found.lengths == C)).view(P, G).all(dim=1)
        num_trained += int(ended.sum())
        left = 0 if trainer.sampler.carried is None else trainer.sampler.carried.num_prompts
        assert left == P - int(ended.sum())
        metrics = output.metrics
        assert metrics["rollout/carried_prompts"] == left
        assert metrics["rollout/step_skipped"] == float(not ended.any())
        assert output.sampled.is_empty == (not ended.any())
        if ended.any():
            trained = output.sampled.trained.rollouts
            rows = ended.repeat_interleave(G).nonzero()[:, 0].tolist()
            expected = [found.completion_ids[row] for row in rows]
            assert all(
                torch.equal(a, b) for a, b in zip(trained.completion_ids, expected, strict=True)
            )
        speed = metrics["tokens_per_second/rollout"] * metrics["time/rollout"]
        assert speed == pytest.approx(drawn)
    assert num_trained > P


def test_staleness_is_the_age_of_every_trained_token(tmp_path):
    trainer = build_trainer(config_of(tmp_path / "run"))
    calls = watched(trainer)
    drawn: list[list[int]] = []  # of the rows in flight, in their order
    oldest = 0
    for step in range(10):
        metrics = trainer.train_step(step).metrics
        started, found = calls[-1]
        drawn += [[] for _ in range(P * G - len(drawn))]
        for b, steps in enumerate(drawn):
            steps += [step] * (len(found.completion_ids[b]) - len(started.completion_ids[b]))
        is_open = ~found.finished & (found.lengths < C)
        ended = ~is_open.view(P, G).any(dim=1).repeat_interleave(G)
        ages = [step - at for b, row in enumerate(drawn) if ended[b] for at in row]
        drawn = [row for b, row in enumerate(drawn) if not ended[b]]
        assert metrics["rollout/carried_completions"] == int(is_open.sum())
        mean = sum(ages) / len(ages) if ages else 0.0
        assert metrics["rollout/staleness_mean"] == pytest.approx(mean)
        assert metrics["rollout/staleness_max"] == max(ages, default=0)
        oldest = max(oldest, *ages, 0)
    assert oldest >= 2


def test_logps_of_a_policy_that_has_moved_on_are_corrected_for(tmp_path):
    """The recorded log-probabilities are the old policy's: the gap to the new one is a metric."""
    config = config_of(tmp_path / "run")
    optim = dataclasses.replace(config.optim, learning_rate=1e-2)
    trainer = build_trainer(dataclasses.replace(config, optim=optim))
    rows = [trainer.train_step(step).metrics for step in range(12)]
    name = "sampling/sampling_logp_difference/max"
    fresh = [row[name] for row in rows if name in row and row["rollout/staleness_max"] == 0]
    stale = [row[name] for row in rows if name in row and row["rollout/staleness_max"] > 0]
    assert max(fresh, default=0.0) < 1e-4
    assert max(stale) > 1e-3


def test_a_wide_budget_is_a_run_without_one(tmp_path):
    """Every group ends in its own step: the same completions, weights and metrics."""
    rollout = dataclasses.replace(config_of("").rollout, max_tokens_per_step=10_000)
    train(config_of(tmp_path / "wide", max_steps=3, rollout=rollout))
    without = dataclasses.replace(rollout, max_tokens_per_step=None)
    train(config_of(tmp_path / "without", max_steps=3, rollout=without))
    first, second = steps_of(tmp_path / "wide"), steps_of(tmp_path / "without")
    for ours, theirs in zip(first, second, strict=True):
        own = {name for name in ours if name.startswith("rollout/")}
        assert {name: ours[name] for name in ours if name not in own} == theirs
        assert all(ours[name] == 0 for name in own)
    weights = [load_file(tmp_path / x / "final/model.safetensors") for x in ("wide", "without")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_killed_run_goes_on_with_what_was_carried(tmp_path):
    config = config_of(tmp_path / "whole")
    train(config)
    carried = [row["rollout/carried_prompts"] for row in steps_of(tmp_path / "whole")]
    for step, num_prompts in enumerate(carried, start=1):
        path = tmp_path / "whole" / f"checkpoint-{step}" / "carried.safetensors"
        assert path.is_file() == (num_prompts > 0)
    stops = [step for step, num_prompts in enumerate(carried[:-1], start=1) if num_prompts > 0]
    for step in (stops[0], stops[-1]):
        killed = tmp_path / f"killed-{step}"
        killed_after(step, tmp_path / "whole", killed)
        train(dataclasses.replace(config, output_dir=str(killed)), resume=True)
        assert_same_end(tmp_path / "whole", killed)
        last = [x / "checkpoint-8" / "carried.safetensors" for x in (tmp_path / "whole", killed)]
        assert last[0].is_file() == last[1].is_file()
        if last[0].is_file():
            assert last[0].read_bytes() == last[1].read_bytes()


def test_steps_without_a_full_group_are_skipped_and_counted(tmp_path):
    rollout = dataclasses.replace(
        config_of("").rollout, max_completion_length=40, max_tokens_per_step=P * G
    )
    config = config_of(tmp_path / "run", rollout=rollout, max_steps=6, max_tokens_per_pass=256)
    train(config)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[0]["rollout/step_skipped"] == 1
    assert rows[0]["grad_norm"] == rows[0]["loss"] == rows[0]["num_tokens"] == 0
    before, after = (
        load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (0, 1)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_reward_that_fails_leaves_the_checkpoint_of_the_step_before(tmp_path):
    """The step is sampled once more after it was mended, to the same completions."""
    train(config_of(tmp_path / "whole", max_steps=5))
    (tmp_path / "reward.py").write_text(
        "from pathlib import Path\n"
        "HERE = Path(__file__).parent\n"
        "def checksum(prompts, completions):\n"
        "    calls = HERE / 'calls'\n"
        "    count = int(calls.read_text()) + 1 if calls.exists() else 1\n"
        "    calls.write_text(str(count))\n"
        "    if count == 5 and not (HERE / 'mended').exists():\n"
        "        raise OSError('out of order')\n"
        "    return [sum(map(ord, completion)) % 7 / 6 for completion in completions]\n"
    )
    config = config_of(
        tmp_path / "run", max_steps=5, rewards=(f"{tmp_path / 'reward.py'}:checksum", "task")
    )
    with pytest.raises(InputError, match="out of order"):
        train(config)
    (tmp_path / "mended").touch()
    train(config, resume=True)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")


def test_dppo_takes_its_ratios_to_the_policies_that_drew(tmp_path):
    config = config_of(tmp_path / "run", method="dppo_tv", objective={})
    optim = dataclasses.replace(config.optim, learning_rate=1e-2)
    trainer = build_trainer(dataclasses.replace(config, optim=optim))
    rows = [trainer.train_step(step).metrics for step in range(12)]
    trained = [row for row in rows if row["rollout/staleness_max"] > 0 and "ratio/max" in row]
    assert max(row["ratio/max"] for row in trained) > 1.001


def test_entropies_of_older_policies_pick_no_tokens(tmp_path):
    """Unless they are asked to: by default those of the policy do, at the cost of a forward."""
    rows = {}
    for scores_from in ("auto", "policy", "sampler"):
        objective = {"token_weights": "high_entropy", "scores_from": scores_from}
        config = config_of(tmp_path / "run", method="dppo_tv", objective=objective)
        optim = dataclasses.replace(config.optim, learning_rate=1e-2)
        trainer = build_trainer(dataclasses.replace(config, optim=optim))
        metrics = [trainer.train_step(step).metrics for step in range(8)]
        rows[scores_from] = [(row["loss"], row["grad_norm"]) for row in metrics]
    assert rows["auto"] == rows["policy"]
    assert rows["auto"] != rows["sampler"]


def test_what_is_in_flight_goes_through_a_checkpoint_bit_by_bit(tmp_path):
    config = config_of(tmp_path / "run")
    rollout = dataclasses.replace(config.rollout, top_p=0.9)
    trainer = build_trainer(dataclasses.replace(config, rollout=rollout))
    sampler = trainer.sampler
    for step in range(2):
        sampler.sample(step, PhaseClock(), keeps=None)
    flight = sampler.carried
    assert flight is not None
    again = in_flight_from(flight.state(), trainer.task)
    assert again.indices == flight.indices
    assert again.rollouts.prompts.examples == flight.rollouts.prompts.examples
    assert torch.equal(again.rollouts.finished, flight.rollouts.finished)
    for name in ("completion_ids", "rollout_logps", "rollout_entropies", "processed_logps"):
        pairs = zip(getattr(again.rollouts, name), getattr(flight.rollouts, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name
    assert all(torch.equal(a, b) for a, b in zip(again.drawn_at, flight.drawn_at, strict=True))


def test_groups_in_flight_are_joined_and_chosen_in_order():
    sampling = Sampling(num_generations=2, max_completion_length=3)
    prompts = Prompts(
        (torch.tensor([4]), torch.tensor([5, 6])), (Example(prompt="a"), Example(prompt="b"))
    )
    flight = begun(prompts, (7, 9), sampling)
    ids = tuple(torch.arange(n) for n in (3, 1, 0, 2))
    logps = tuple(-x.float() for x in ids)
    finished = torch.tensor([False, True, False, False])
    rollouts = Rollouts(prompts, ids, logps, finished, rollout_entropies=logps)
    flight = flight.advanced(rollouts, 4)
    assert flight.ended(3).tolist() == [True, False]
    swapped = side_by_side([flight.of_prompts([1]), flight.of_prompts([0])])
    assert swapped.indices == (9, 7)
    assert [len(x) for x in swapped.rollouts.completion_ids] == [0, 2, 3, 1]
    assert [x.tolist() for x in swapped.drawn_at] == [[], [4, 4], [4, 4, 4], [4]]
    metrics = staleness_metrics(flight.of_prompts([0]), flight.of_prompts([1]), sampling, 6)
    assert metrics["rollout/staleness_mean"] == 2.0
    assert metrics["rollout/carried_completions"] == 2.0
    assert isinstance(swapped, InFlight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_tokens_per_step": P * G - 1},
            r"at least 12, one token for each of prompts_per_step",
        ),
        ({"engine": "generate"}, "which 'generate' cannot; use rollout.engine 'native'"),
    ],
)
def test_what_cannot_be_carried(tmp_path, changes, message):
    rollout = dataclasses.replace(config_of("").rollout, **changes)
    with pytest.raises(InputError, match=message):
        train(config_of(tmp_path / "run", rollout=rollout))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": {}},
            "'grpo' does not correct; set objective.rollout_correction .* ratio_to_sampler",
        ),
        (
            {"method": "dapo", "objective": {"parameters": {"cache": 2.0}}},
            "dynamic_sampling exclude each other",
        ),
    ],
)
def test_methods_that_cannot_be_partial(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(config_of(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
