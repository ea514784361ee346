"""A*-PO through real runs: the written-out step, kills in both stages, prompts left out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastrl.assembly import build_trainer
from fastrl.config import RolloutConfig, SaveConfig, WarmStartConfig
from fastrl.config_io import load_config
from fastrl.errors import InputError
from fastrl.methods import METHODS
from fastrl.phase_clock import PhaseClock
from fastrl.report import read_metrics
from fastrl.run import train
from fastrl.trainer import Trainer
from fastrl.values.fingerprint import value_keys
from fastrl.values.store import ValueStore
from fastrl.vstar import run_vstar
from tests.helpers_updates import make_exact
from tests.test_training import EXAMPLES, numbers, weights
from tests.test_values import Killed, astar_config, small_batches, stored  # noqa: F401


def token_distributions(policy, prompt, completion, temperature):
    """(T, V) log-probabilities of a completion's tokens, one plain forward pass each."""
    ids = torch.cat([prompt, completion])
    logits = policy.model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(dim=1)


@pytest.mark.parametrize(
    ("max_tokens_per_pass", "parts"),
    [(128, [range(7)]), (54, [range(7)]), (128, [range(4), range(4, 7)])],
)
def test_a_step_is_the_formula(tmp_path, max_tokens_per_pass, parts):
    """mean (0.001 (L - L_ref) + V* - r)^2 - 0.001 mean H, with V* = 0.5 log mean exp(2 r_ref)."""
    rollout = dataclasses.replace(astar_config(tmp_path).rollout, temperature=0.8)
    config = astar_config(tmp_path, rollout=rollout, max_tokens_per_pass=max_tokens_per_pass)
    config = dataclasses.replace(config, prompts_per_step=7, num_mini_batches=len(parts))
    trainer = build_trainer(config)
    trainer.sampler.values.prepare()
    make_exact(trainer, learning_rate=0.0)
    reference = trainer.policy.frozen_copy()
    with torch.no_grad():
        for index, weight in enumerate(reference.model.parameters()):
            generator = torch.Generator().manual_seed(index)
            weight += 0.03 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    trainer.reference = reference
    gradients = {name: torch.zeros_like(p) for name, p in trainer.policy.model.named_parameters()}
    expected_losses, expected = written_out(trainer, reference, stored(tmp_path), parts)
    for name, p in trainer.policy.model.named_parameters():
        p.register_hook(lambda gradient, name=name: gradients[name].add_(gradient))
    output = trainer.train_step(0)
    assert (output.metrics["packing/passes"] > 1) == (max_tokens_per_pass == 54 or len(parts) > 1)
    assert output.metrics["loss"] == pytest.approx(sum(expected_losses) / len(parts), rel=1e-9)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-7, atol=1e-12)


def written_out(trainer, reference, rewards_of, parts):
    """Loss and gradient of step 0, a completion at a time; a mean over each part, and their sum."""
    state = trainer.sampler.stream.state_dict()
    sampled = trainer.sample(0, PhaseClock())
    trainer.sampler.stream.load_state_dict(state)
    rollouts, rewards = sampled.trained.rollouts, sampled.trained.rewards.total.double()
    assert rollouts.num_generations == 1
    errors, entropies = [], []
    for b, completion in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompts.token_ids[b]
        logps = token_distributions(trainer.policy, prompt, completion, 0.8)
        with torch.no_grad():
            ref_logps = token_distributions(reference, prompt, completion, 0.8)
        picked = (logps - ref_logps).gather(1, completion[:, None]).sum()
        (key,) = value_keys(trainer.encode([rollouts.prompts.examples[b]]), trainer.task)
        value = 0.5 * math.log(math.fsum(math.exp(2 * r) for r in rewards_of[key]) / 8)
        errors.append((1e-3 * picked + value - rewards[b]).square())
        entropies.append(-(logps.exp() * logps).sum(dim=1))
    losses = [
        torch.stack([errors[b] for b in part]).mean()
        - 1e-3 * torch.cat([entropies[b] for b in part]).mean()
        for part in parts
    ]
    sum(losses).backward()
    model = trainer.policy.model
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return [float(loss.detach()) for loss in losses], found


def with_saves(config, **changes):
    save = SaveConfig(save_steps=1, save_total_limit=9)
    warm_start = WarmStartConfig(steps=3, batch_size=4)
    return dataclasses.replace(config, save=save, warm_start=warm_start, **changes)


def assert_same_end(first, second):
    ours, theirs = ([r for r in numbers(d) if "loss" in r] for d in (first, second))
    assert ours == theirs
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name


def test_a_killed_run_ends_like_one_that_was_not(tmp_path, small_batches, monkeypatch):  # noqa: F811
    """Killed in stage one, then in stage two: the same rewards, weights and metrics."""
    whole = with_saves(astar_config(tmp_path / "whole"))
    train(whole)
    killed = with_saves(astar_config(tmp_path / "killed"))
    add = ValueStore.add

    def add_once(self, keys, rewards):
        if self.rewards:
            raise Killed
        add(self, keys, rewards)

    with monkeypatch.context() as patch:
        patch.setattr(ValueStore, "add", add_once)
        with pytest.raises(Killed):
            train(killed)
    assert len(stored(tmp_path / "killed")) == 4
    save = ValueStore.add
    num_added = []

    def counted(self, keys, rewards):
        num_added.append(len(keys))
        save(self, keys, rewards)

    monkeypatch.setattr(ValueStore, "add", counted)
    steps = []

    original = Trainer.train_step

    def die(self, step):
        if step == 2:
            raise Killed
        steps.append(step)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", die)
        with pytest.raises(Killed):
            train(killed, resume=True)
    assert steps == [0, 1]
    assert num_added == [4, 4]
    train(killed, resume=True)
    assert num_added == [4, 4]
    assert stored(tmp_path / "killed") == stored(tmp_path / "whole")
    assert_same_end(tmp_path / "whole" / "run", tmp_path / "killed" / "run")


def test_vstar_beforehand_is_the_same_run_and_leaves_nothing_to_sample(tmp_path):
    train(with_saves(astar_config(tmp_path / "alone")))
    config = with_saves(astar_config(tmp_path / "before"))
    assert run_vstar(config).num_sampled == 12
    shards = list((tmp_path / "before" / "values").glob("*/rewards-*"))
    train(config)
    assert list((tmp_path / "before" / "values").glob("*/rewards-*")) == shards
    assert stored(tmp_path / "before") == stored(tmp_path / "alone")
    assert_same_end(tmp_path / "alone" / "run", tmp_path / "before" / "run")


def test_more_steps_need_values_that_only_the_first_policy_can_give(tmp_path):
    config = with_saves(astar_config(tmp_path))
    train(config)
    longer = dataclasses.replace(config, max_steps=6)
    with pytest.raises(InputError, match="run fastrl vstar with the run's config"):
        train(longer, resume=True)
    assert run_vstar(longer).num_sampled == 6
    train(longer, resume=True)
    whole = with_saves(astar_config(tmp_path / "whole"), max_steps=6)
    train(whole)
    assert_same_end(tmp_path / "whole" / "run", tmp_path / "run")


def test_prompts_that_are_never_solved_are_left_out(tmp_path):
    """Only prompts that passed once of 8 times are asked, and the run knows enough of them."""
    (tmp_path / "reward.py").write_text(
        "def some(completions):\n    return [float(ord(c[0]) % 3 == 0) if c else 0.0 "
        "for c in completions]\n"
    )
    reward = (f"{tmp_path / 'reward.py'}:some",)
    parameters = {"min_solved": 3}
    config = astar_config(tmp_path, rewards=reward, objective={"parameters": parameters})
    summary = run_vstar(config)
    assert 0 < summary.num_dropped < summary.num_prompts
    assert summary.num_prompts - summary.num_dropped >= 12
    trainer = build_trainer(config)
    trainer.sampler.values.prepare()
    asked = []
    for step in range(4):
        sampled = trainer.sample(step, PhaseClock())
        asked += value_keys(sampled.trained.rollouts.prompts, trainer.task)
        indices = trainer.sampler.recorded[0].indices
        examples = [trainer.task.train_example(index).prompt for index in indices]
        assert examples == [x.prompt for x in sampled.trained.rollouts.prompts.examples]
    found = stored(tmp_path)
    assert all(sum(found[key]) >= 3 for key in asked)
    assert len(asked) == 12
    train(config)
    assert all(
        r["values/reference_reward"] >= 3 / 8 for r in numbers(tmp_path / "run") if "loss" in r
    )


def test_a_prompt_without_a_value_is_one_clear_error(tmp_path):
    trainer = build_trainer(astar_config(tmp_path))
    trainer.sampler.values.prepare()
    trainer.sampler.stream.cursor = 40
    with pytest.raises(InputError, match="no rewards of reference completions for the prompt"):
        trainer.train_step(0)


def test_aapo_compares_with_one_reference_completion_each(tmp_path):
    rollout = RolloutConfig(num_generations=4, max_prompt_length=48, max_completion_length=5)
    config = astar_config(tmp_path, method="aapo", rollout=rollout)
    train(config)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert all(row["grad_norm"] > 0 for row in rows)
    (directory,) = (tmp_path / "values").iterdir()
    found = ValueStore(directory, 4, {}).rewards
    trainer = build_trainer(config)
    trainer.sampler.values.prepare()
    sampled = trainer.sample(0, PhaseClock()).trained
    inputs = trainer.inputs(sampled.rollouts, sampled.rewards, 0)
    keys = value_keys(sampled.rollouts.prompts, trainer.task)
    assert inputs.ref_rewards.tolist() == [reward for key in keys for reward in found[key]]
    assert not METHODS["aapo"].missing


def test_the_example_is_a_run_that_can_begin(tmp_path):
    config = load_config(EXAMPLES / "demo_astar_po.toml")
    config = dataclasses.replace(
        config, max_steps=1, prompts_per_step=4, values_dir=str(tmp_path / "values"),
        warm_start=WarmStartConfig(),
    )  # fmt: skip
    summary = run_vstar(config)
    assert (summary.num_prompts, summary.num_samples) == (4, 8)
