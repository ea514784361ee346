"""Stage one of A*-PO: what is stored, what finds it again, and what a kill leaves."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from fastrl.assembly import build_trainer
from fastrl.config import (
    DataConfig,
    EvalConfig,
    ObjectiveConfig,
    RolloutConfig,
    WarmStartConfig,
)
from fastrl.errors import InputError
from fastrl.methods import resolve_method, use
from fastrl.methods.estimates import advantages_of
from fastrl.policy import load_policy
from fastrl.types import Rewards
from fastrl.values import reference
from fastrl.values.fingerprint import fingerprint, value_keys
from fastrl.values.store import ValueStore
from fastrl.vstar import run_vstar
from tests.helpers import tiny_policy
from tests.test_training import tiny_config

ROLLOUT = RolloutConfig(num_generations=1, max_prompt_length=48, max_completion_length=5)


def astar_config(tmp_path, **changes):
    """A run of 4 steps of 3 prompts; values of all runs of a test lie in one place."""
    config = tiny_config(
        tmp_path / "run", method="astar_po", rollout=ROLLOUT, values_dir=str(tmp_path / "values"),
        warm_start=WarmStartConfig(), data=DataConfig(eval_size=2), eval=EvalConfig(num_samples=1),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def write_task(path, num_records: int) -> str:
    lines = [json.dumps({"prompt": f"What is {a} + {a}?", "answer": str(a)}) for a in range(32)]
    path.write_text("\n".join(lines[:num_records]) + "\n", encoding="utf-8")
    return f"jsonl:{path}"


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(reference, "PROMPTS_PER_BATCH", 4)


def stored(tmp_path):
    (directory,) = (tmp_path / "values").iterdir()
    return ValueStore(directory, 8, {}).rewards


def test_values_are_the_formula_of_the_stored_rewards(tmp_path):
    """r - beta log mean exp(r_ref / beta), in float64 from what stands in the files."""
    trainer = build_trainer(astar_config(tmp_path))
    trainer.sampler.values.prepare()
    prompts = trainer.encode([trainer.task.train_example(i) for i in (2, 0, 7)])
    engine, sampling = trainer.sampler.engine, trainer.sampler.sampling
    rollouts = engine.generate(prompts, sampling, torch.Generator().manual_seed(1))
    total = torch.tensor([0.25, 1.0, -3.0])
    inputs = trainer.inputs(rollouts, Rewards(total, {}), 0)
    found = stored(tmp_path)
    keys = value_keys(prompts, trainer.task)
    assert len({len(set(found[key])) for key in keys} | {1}) > 1, "rewards differ"
    for beta in (0.5, 0.05, 3.0):
        expected = [
            float(r) - beta * math.log(math.fsum(math.exp(x / beta) for x in found[key]) / 8)
            for r, key in zip(total, keys, strict=True)
        ]
        method = trainer.method
        choice = dataclasses.replace(method.advantage, parameters={"beta": beta})
        method = dataclasses.replace(method, advantage=choice)
        values = advantages_of(method, inputs)
        assert values.dtype == torch.float64
        assert values.tolist() == pytest.approx(expected, abs=1e-12)
    for beta, limit in ((1e-9, max), (1e9, lambda row: math.fsum(row) / 8)):
        choice = dataclasses.replace(trainer.method.advantage, parameters={"beta": beta})
        values = advantages_of(dataclasses.replace(trainer.method, advantage=choice), inputs)
        expected = [float(r) - limit(found[key]) for r, key in zip(total, keys, strict=True)]
        assert values.tolist() == pytest.approx(expected, abs=1e-8)


def test_every_prompt_of_the_run_is_sampled_once(tmp_path):
    config = astar_config(tmp_path)
    summary = run_vstar(config)
    trainer = build_trainer(config)
    prompts = trainer.encode([trainer.task.train_example(i) for i in range(18)])
    keys = value_keys(prompts, trainer.task)
    num = len(set(keys[:12]))  # a prompt comes twice
    assert set(stored(tmp_path)) == set(keys[:12])
    assert summary.num_sampled == summary.num_prompts == len(stored(tmp_path)) == num == 11
    rows = list(stored(tmp_path).values())
    assert summary.num_solved == sum(max(row) >= 1.0 for row in rows)
    assert summary.mean_reward == pytest.approx(sum(map(sum, rows)) / 88)
    assert run_vstar(config).num_sampled == 0
    assert run_vstar(dataclasses.replace(config, max_steps=6)).num_sampled == len(set(keys)) - 11


def test_all_of_a_file_once_even_over_epochs(tmp_path):
    task = write_task(tmp_path / "data.jsonl", 11)
    config = astar_config(tmp_path, task=task, task_args={}, rewards=("exact",), max_steps=50)
    assert run_vstar(config).num_sampled == 9
    config = dataclasses.replace(config, max_steps=2)
    assert run_vstar(config).num_sampled == 0


def test_another_run_finds_the_values_again_if_nothing_they_depend_on_changed(tmp_path):
    tiny_policy().save(tmp_path / "model")
    (tmp_path / "length.py").write_text(
        "def f(completions):\n    return [1.0] * len(completions)\n"
    )
    base = astar_config(tmp_path)
    config = dataclasses.replace(
        base, task=write_task(tmp_path / "data.jsonl", 11), task_args={}, max_steps=10,
        rewards=("exact", f"{tmp_path / 'length.py'}:f"),
        model=dataclasses.replace(base.model, path=str(tmp_path / "model"), architecture={}),
    )  # fmt: skip
    assert run_vstar(config).num_sampled == 9

    def sampled(**changes):
        return run_vstar(dataclasses.replace(config, **changes)).num_sampled

    # Another seed holds out other records, whose prompts are new; it repeats none.
    assert sampled(seed=1) <= 2
    assert sampled(output_dir="elsewhere", max_steps=7, prompts_per_step=5) == 0
    assert sampled(objective={"parameters": {"advantage.beta": 2.0, "loss.beta": 0.1}}) == 0
    assert sampled(objective={"parameters": {"min_solved": 0}, "entropy_coef": 0.0}) == 0
    assert sampled(objective={"parameters": {"num_samples": 4}}) == 9
    assert sampled(rollout=dataclasses.replace(ROLLOUT, temperature=0.7)) == 9
    assert sampled(rollout=dataclasses.replace(ROLLOUT, max_completion_length=4)) == 9
    assert sampled(rewards=("exact",)) == 9
    (tmp_path / "length.py").write_text(
        "def f(completions):\n    return [2.0] * len(completions)\n"
    )
    assert sampled() == 9
    model = tiny_policy()
    with torch.no_grad():
        model.model.model.norm.weight[3] *= 1 + 1e-6
    model.save(tmp_path / "model")
    assert sampled() == 9


def test_a_changed_answer_or_column_is_another_prompt(tmp_path):
    path = tmp_path / "data.jsonl"
    config = astar_config(tmp_path, task=write_task(path, 11), task_args={}, rewards=("exact",))
    config = dataclasses.replace(config, max_steps=10)
    first = run_vstar(config).num_sampled
    lines = path.read_text().splitlines()
    changed = [json.dumps({**json.loads(line), "answer": "x"}) for line in lines]
    assert first == 9
    path.write_text("\n".join(changed))
    # A fresh policy's tokenizer would know of it, so the digest of the prompts is looked at.
    (old, new) = (build_trainer(c) for c in (config, config))
    example = old.task.train_example(0)
    prompts = [
        old.encode([dataclasses.replace(example, **changes)])
        for changes in ({}, {"answer": "3"}, {"columns": {"level": 2}}, {"prompt": "What is 1?"})
    ]
    assert len({value_keys(x, new.task)[0] for x in prompts}) == 4


def test_the_key_survives_saving_and_loading(tmp_path):
    trainer = build_trainer(astar_config(tmp_path))
    sampling = trainer.sampler.values.sampling
    before = fingerprint(trainer.policy, trainer.config, sampling)
    trainer.policy.save(tmp_path / "saved")
    again = load_policy(trainer.config.model, tmp_path / "saved")
    assert fingerprint(again, trainer.config, sampling) == before


def test_an_adapter_that_adds_nothing_yet_begins_with_its_base(tmp_path):
    pytest.importorskip("peft")
    tiny_policy().save(tmp_path / "model")
    base = astar_config(tmp_path)
    model = dataclasses.replace(base.model, path=str(tmp_path / "model"), architecture={})
    task = write_task(tmp_path / "data.jsonl", 11)
    config = dataclasses.replace(
        base, task=task, task_args={}, rewards=("exact",), model=model, max_steps=10
    )
    assert run_vstar(config).num_sampled == 9
    adapted = dataclasses.replace(config, model=dataclasses.replace(model, lora={"r": 2}))
    assert run_vstar(adapted).num_sampled == 0
    trainer = build_trainer(adapted)
    with torch.no_grad():
        for name, weight in trainer.policy.model.named_parameters():
            if "lora_B" in name:
                weight[0, 0] = 1e-3
    assert trainer.sampler.values.prepare().num_sampled == 9


def test_a_mixture_has_no_epochs(tmp_path):
    """Its prompts are those of the first steps, whatever its files hold."""
    task = write_task(tmp_path / "data.jsonl", 20)
    config = astar_config(tmp_path)
    sums = {"task": config.task, "task_args": config.task_args}
    config = dataclasses.replace(
        config, task="mixture", task_args={"tasks": [{"task": task}, sums]},
        rewards=config.rewards[:1],
    )  # fmt: skip
    summary = run_vstar(config)
    trainer = build_trainer(config)
    prompts = trainer.encode([trainer.task.train_example(i) for i in range(12)])
    assert set(stored(tmp_path)) == set(value_keys(prompts, trainer.task))
    assert summary.num_sampled == len(stored(tmp_path))


class Killed(BaseException):
    """The machine went away."""


@pytest.mark.parametrize("torn", [0, 1, 40])
def test_a_kill_loses_no_more_than_its_batch_and_changes_no_bit(tmp_path, small_batches, torn):
    config = astar_config(tmp_path / "whole")
    run_vstar(config)
    expected = stored(tmp_path / "whole")

    def stop(progress):
        if progress.num_sampled == 8:
            raise Killed

    config = astar_config(tmp_path)
    with pytest.raises(Killed):
        run_vstar(config, on_batch=stop)
    (shard,) = (tmp_path / "values").glob("*/rewards-*.jsonl")
    content = shard.read_bytes()
    assert content.count(b"\n") == 2
    shard.write_bytes(content[: len(content) - torn])
    summary = run_vstar(config)
    assert summary.num_torn == (torn > 0)
    assert summary.num_sampled == (3 if torn == 0 else 7)
    assert stored(tmp_path) == expected


def test_files_that_were_damaged_are_named(tmp_path):
    store = ValueStore(tmp_path, 2, {})
    store.add(["a", "b"], torch.tensor([[0.0, 1.0], [0.5, -2.0]]))
    store.add(["c"], torch.tensor([[1.0, 1.0]]))
    other = ValueStore(tmp_path, 2, {})  # another process at the same time
    other.add(["a"], torch.tensor([[9.0, 9.0]]))
    for each in (store, other):
        each.close()
    again = ValueStore(tmp_path, 2, {})
    assert again.rewards == {"a": (0.0, 1.0), "b": (0.5, -2.0), "c": (1.0, 1.0)}
    assert again.num_torn == 0
    shard = tmp_path / "rewards-0001.jsonl"
    first, second, _ = shard.read_bytes().split(b"\n")
    shard.write_bytes(first + b"\n" + bytes(len(second)) + b"\n")  # its bytes never came
    again = ValueStore(tmp_path, 2, {})
    assert set(again.rewards) == {"a", "b"}
    assert again.num_torn == 1
    shard.write_bytes(first[:-4] + b"\n" + second + b"\n")
    with pytest.raises(InputError, match=r"rewards-0001\.jsonl:1 is no batch of 2 rewards"):
        ValueStore(tmp_path, 2, {})


def test_values_that_cannot_be_known_before_a_run_are_refused(tmp_path):
    config = astar_config(tmp_path, objective={"max_pass_rate": 0.9})
    with pytest.raises(InputError, match="cannot be known before a run"):
        build_trainer(config)
    with pytest.raises(InputError, match="min_solved must be at most the 8 samples"):
        build_trainer(astar_config(tmp_path, objective={"parameters": {"min_solved": 9}}))
    with pytest.raises(InputError, match="'grpo' needs no values"):
        run_vstar(astar_config(tmp_path, method="grpo", rollout=tiny_config("").rollout))
    config = astar_config(tmp_path, method="aapo", objective={"parameters": {"num_samples": 3}})
    config = dataclasses.replace(config, rollout=dataclasses.replace(ROLLOUT, num_generations=4))
    with pytest.raises(InputError, match=r"must be rollout\.num_generations, 4, or 0"):
        build_trainer(config)


@pytest.mark.parametrize(
    ("overrides", "source"),
    [
        ({"advantage": "baseline_centred"}, "greedy_completion"),
        ({"advantage": "reference_value_centred"}, "reference_rollouts"),
        ({"advantage": "reference_margin"}, "reference_rollouts"),
        ({"loss": "optimal_advantage_regression"}, None),
    ],
)
def test_an_advantage_brings_the_values_that_it_asks_for(overrides, source):
    method = resolve_method("grpo", ObjectiveConfig(**overrides))
    assert method.choices.get("prompt_values") == (source and use(source))


def test_a_regression_takes_advantages_of_completions_only():
    with pytest.raises(InputError, match="takes one advantage for a completion"):
        resolve_method("astar_po", ObjectiveConfig(advantage="whitened_returns"))
    with pytest.raises(InputError, match="no effect beside a loss of pairs"):
        resolve_method("rebel", ObjectiveConfig(advantage="group_centred"))
    choice = use("leave_one_out")
    assert resolve_method("astar_po", ObjectiveConfig(advantage=choice.name)).advantage == choice
