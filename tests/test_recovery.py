"""Memory that runs out inside a step: the step is that of a run with smaller passes from the start.

Failing allocations are injected at chosen operations; tests/test_memory_limit.py has real ones.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

import fastrl.loss
import fastrl.trainer
import fastrl.warm_start
from fastrl.activations import smallest_pass
from fastrl.assembly import build_trainer
from fastrl.checkpoint import load_state
from fastrl.config import (
    CriticConfig,
    EvalConfig,
    OptimConfig,
    RolloutConfig,
    SaveConfig,
    WarmStartConfig,
)
from fastrl.errors import InputError
from fastrl.memory.expected import Expected
from fastrl.memory.recovery import (
    MAX_FAILURES,
    OutOfMemory,
    Recovery,
    is_out_of_memory,
    reason_of,
)
from fastrl.methods.needs import requirements
from fastrl.optim.lean import LeanAdamW
from fastrl.policy import Policy
from fastrl.reference import make_reference
from fastrl.report import read_metrics
from fastrl.rollout.native import NativeEngine
from fastrl.run import train
from tests.helpers_memory import MESSAGE, Shortage, state_of
from tests.test_training import TIMES, numbers, tiny_config, weights

WIDE = 4096
"""Tokens of a pass that holds a whole step of `config_of`: 144 or so at most."""
KL = {"beta": 0.04}
STAGES = {
    "rollout": (NativeEngine, "_advance", 60),
    "prefill": (NativeEngine, "_advance", 9),
    "score": (fastrl.trainer, "token_statistics", 20),
    "forward": (Policy, "hidden_states", 40),
    "head": (fastrl.loss, "policy_pass_loss", 5),
    "backward": (fastrl.loss, "_backward", 30),
    "state": (LeanAdamW, "reserve", 7),
}
"""Where memory runs out: what is watched, and which of its operations fails."""


def config_of(directory, **changes):
    base = {
        "max_tokens_per_pass": WIDE,
        "warm_start": WarmStartConfig(steps=0),
        "objective": KL,
        "rollout": RolloutConfig(num_generations=4, max_prompt_length=16, max_completion_length=10),
        "eval": EvalConfig(num_samples=1),
    }
    return tiny_config(directory, **{**base, **changes})


def trainer_of(config):
    trainer = build_trainer(config)
    if "ref_logps" in requirements(trainer.method):
        trainer.reference = make_reference(trainer.policy, "copy")
    return trainer


def configured_as(trainer, config):
    """A trainer whose configuration has what memory left of the sizes of another one."""
    arguments = dict(config.rollout.engine_args)
    if trainer.recovery.kv_cache_gib is not None:
        arguments["kv_cache_gib"] = trainer.recovery.kv_cache_gib
    rollout = dataclasses.replace(config.rollout, engine_args=arguments)
    return trainer_of(
        dataclasses.replace(
            config, max_tokens_per_pass=trainer.recovery.max_tokens_per_pass, rollout=rollout
        )
    )


def steps(trainer, count=2):
    """Metrics but for those of the clock, and completions, of the first steps."""
    found = []
    for step in range(count):
        output = trainer.train_step(step)
        metrics = {k: v for k, v in output.metrics.items() if not any(word in k for word in TIMES)}
        found.append((metrics, output.sampled.everything.texts))
    return found


def assert_same_state(first, second):
    states = [state_of(trainer) for trainer in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_met_the_end_of_memory_is_that_of_smaller_passes(monkeypatch, stage):
    owner, name, at = STAGES[stage]
    shortage = Shortage(at=at).watch(monkeypatch, owner, name)
    trainer = trainer_of(config_of("unused"))
    with shortage:
        found = steps(trainer)
    assert shortage.num_failures == 1
    recovery = trainer.recovery
    if stage in ("rollout", "prefill"):
        assert recovery.max_tokens_per_pass == WIDE
        assert recovery.kv_cache_gib > 0
    else:
        assert recovery.smallest < recovery.max_tokens_per_pass < 100  # half of what it needed
        assert recovery.kv_cache_gib is None
    truth = configured_as(trainer, trainer.config)
    assert found == steps(truth)
    assert (found[0][0]["packing/passes"] > 1) == (recovery.max_tokens_per_pass < WIDE)
    assert_same_state(trainer, truth)


OTHERS = {
    "value head": ("backward", {"method": "ppo", "objective": {}}),
    "value adapter": (
        "state",
        {
            "method": "ppo",
            "objective": {},
            "model": {"lora": {"r": 2, "target_modules": ["q_proj"]}},
            "critic": CriticConfig(model="lora"),
        },
    ),
    "scores of tokens": ("head", {"method": "d3s"}),
    "tracked rates": ("forward", {"method": "spo_single_stream", "objective": {}}),
    "two phases": (
        "state",
        {"optim": OptimConfig(learning_rate=1e-3, in_backward="two_phase")},
    ),
    "rounded by chance": (
        "backward",
        {
            "optim": OptimConfig(learning_rate=1e-3, optimizer="adamw_8bit"),
            "model": {"precision": "stochastic"},
        },
    ),
    "mini-batches": ("state", {"num_mini_batches": 2}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_of_other_methods_and_optimizers_too(tmp_path, monkeypatch, name):
    stage, changes = OTHERS[name]
    base = config_of(tmp_path / "run")
    model = dataclasses.replace(base.model, **changes.get("model", {}))
    config = dataclasses.replace(base, **{**changes, "model": model})
    owner, name, at = STAGES[stage]
    shortage = Shortage(at=at).watch(monkeypatch, owner, name)
    trainer = trainer_of(config)
    with shortage:
        found = steps(trainer, 1)
    assert shortage.num_failures == 1
    truth = configured_as(trainer, config)
    assert found == steps(truth, 1)
    assert_same_state(trainer, truth)


def test_a_second_failure_halves_again_and_the_passes_stay_small(monkeypatch):
    shortage = Shortage(at=30, times=2).watch(monkeypatch, fastrl.loss, "_backward")
    config = config_of("unused")
    trainer = trainer_of(config)
    with shortage:
        first, second = (trainer.train_step(step).metrics for step in range(2))
    assert (first["memory/oom"], second["memory/oom"]) == (2, 0)
    smallest = trainer.recovery.smallest
    assert first["memory/max_tokens_per_pass"] == second["memory/max_tokens_per_pass"]
    assert smallest <= first["memory/max_tokens_per_pass"] < 50
    assert first["packing/passes"] >= 4
    truth = configured_as(trainer, config)
    for step in range(2):
        truth.train_step(step)
    assert_same_state(trainer, truth)
    assert len(trainer.recovery.take_notes()) == 2  # one for each
    assert trainer.recovery.take_notes() == []


def test_nothing_of_an_attempt_is_left_in_memory(monkeypatch):
    kept = []
    hidden_states = Policy.hidden_states

    def watched(self, plan):
        found = hidden_states(self, plan)
        kept.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Policy, "hidden_states", watched)
    alive = []
    forget = Recovery.failed

    def failed(self, reason):
        forget(self, reason)
        alive.append(sum(one() is not None for one in kept))
        gradients = [p.grad for p in trainer.policy.model.parameters() if p.grad is not None]
        alive.append(len(gradients))

    monkeypatch.setattr(Recovery, "failed", failed)
    shortage = Shortage(at=60).watch(monkeypatch, fastrl.loss, "_backward")
    trainer = trainer_of(config_of("unused"))
    gc.collect()
    gc.disable()
    try:
        with shortage:
            trainer.train_step(0)
    finally:
        gc.enable()
    assert alive == [0, 0]
    assert len(kept) >= 4


@pytest.mark.parametrize("method", ["grpo", "d3s", "sfpo"])
def test_after_the_first_optimizer_step_the_failed_one_alone_is_redone(monkeypatch, method):
    """Weights have moved, so what comes before stays: equal to smaller passes but for rounding."""
    options = {"num_iterations": 2, "num_mini_batches": 2} if method != "sfpo" else {}
    config = config_of("unused", method=method, **options)
    shortage = Shortage(at=30, after=1).watch(monkeypatch, fastrl.loss, "_backward")
    trainer = trainer_of(config)
    with shortage:
        found = trainer.train_step(0).metrics
    assert shortage.num_failures == 1
    truth = configured_as(trainer, config)
    expected = truth.train_step(0).metrics
    assert trainer.learner.num_begun == truth.learner.num_begun
    for key in ("loss", "grad_norm", "entropy", "ref_kl/k3", "old_kl/k3", "reward"):
        assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
    for first, second in zip(
        trainer.policy.model.parameters(), truth.policy.model.parameters(), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=0, atol=2e-5)
    again = trainer_of(config)
    shortage.num_failures = shortage.num_calls = 0
    with shortage:
        again.train_step(0)
    assert shortage.num_failures == 1
    assert_same_state(trainer, again)


def test_a_step_with_nothing_applied_yet_begins_anew_though_one_was_left_out(monkeypatch):
    """The first optimizer step was not finite, the second finds no memory: counted once."""
    original = fastrl.loss.policy_pass_loss
    calls = []

    def spoiled(*args, **options):
        found = original(*args, **options)
        calls.append(0)
        is_bad = len(calls) in spoilt
        return found._replace(loss=found.loss * float("nan")) if is_bad else found

    monkeypatch.setattr(fastrl.loss, "policy_pass_loss", spoiled)
    shortage = Shortage(at=30, after=1).watch(monkeypatch, fastrl.loss, "_backward")
    spoilt = {1, 3}  # that of the attempt, and that of the attempt in smaller passes
    trainer = trainer_of(config_of("unused", num_mini_batches=3))
    with shortage:
        metrics = trainer.train_step(0).metrics
    assert shortage.num_failures == 1
    assert metrics["skipped/non_finite"] == 1
    assert trainer.learner.num_begun == 2


def test_rewards_are_asked_for_once_however_often_completions_are_sampled(monkeypatch, tmp_path):
    """Completions that ended before memory did are forgotten by the workers too."""
    changes = {"reward_workers": 1, "rewards": ("exact",)}
    config = config_of(tmp_path, prompts_per_step=6, **changes)
    shortage = Shortage(at=2500).watch(monkeypatch, NativeEngine, "_advance")
    trainer = trainer_of(config)
    try:
        # So that many end early.
        trainer.policy.eos_token_ids = list(range(0, 300, 8))
        submitted = []
        submit = trainer.sampler.scorer.submit

        def watched(row, *args, **options):
            submitted.append((shortage.num_failures, row))
            submit(row, *args, **options)

        trainer.sampler.scorer.submit = watched
        with shortage:
            output = trainer.train_step(0)
    finally:
        trainer.sampler.scorer.close()
    early = [row for count, row in submitted if count == 0]
    late = [row for count, row in submitted if count == 1]
    assert early
    assert sorted(late) == list(range(24))
    truth = configured_as(trainer, config)
    try:
        truth.policy.eos_token_ids = list(range(0, 300, 8))
        expected = truth.train_step(0)
    finally:
        truth.sampler.scorer.close()
    assert output.sampled.everything.texts == expected.sampled.everything.texts
    names = [name for name in expected.metrics if not any(word in name for word in TIMES)]
    assert "rewards/cache_hits" in names
    assert [output.metrics[name] for name in names] == [expected.metrics[name] for name in names]


def run_config(directory, **changes):
    return config_of(directory, **{"max_steps": 3, "save": SaveConfig(save_steps=1), **changes})


def rows_of(directory):
    return [row for row in read_metrics(directory) if "loss" in row]


def test_the_smaller_pass_is_logged_saved_and_resumed(monkeypatch, tmp_path, capsys):
    run, truth = run_config(tmp_path / "run"), run_config(tmp_path / "truth")
    shortage = Shortage(at=30, after=1).watch(monkeypatch, fastrl.loss, "_backward")
    with shortage:
        train(dataclasses.replace(run, max_steps=2))
    shown = capsys.readouterr().out
    assert shortage.num_failures == 1
    rows = rows_of(tmp_path / "run")
    assert [row["memory/oom"] for row in rows] == [0, 1]
    small = rows[1]["memory/max_tokens_per_pass"]
    assert rows[0]["memory/max_tokens_per_pass"] == WIDE > 100 > small
    assert f"step 2: out of memory: {reason_of(RuntimeError(MESSAGE))}; passes have" in shown
    assert shortage.num_calls == 1 + 1 + rows[1]["packing/passes"]
    state = load_state(tmp_path / "run" / "checkpoint-2")
    assert state.memory["max_tokens_per_pass"] == small
    train(run, resume=True)  # with what the checkpoint knows
    # One step in large passes, then a configuration with small ones.
    train(dataclasses.replace(truth, max_steps=1))
    train(dataclasses.replace(truth, max_tokens_per_pass=int(small)), resume=True)
    assert_same_steps(tmp_path / "run", tmp_path / "truth")
    assert rows_of(tmp_path / "run")[2]["memory/max_tokens_per_pass"] == small


def assert_same_steps(first, second):
    found = [[row for row in numbers(where) if "loss" in row] for where in (first, second)]
    assert found[0] == found[1]
    texts = [(where / "completions.jsonl").read_text() for where in (first, second)]
    assert texts[0] == texts[1]
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name


def test_the_third_failure_of_a_step_ends_the_run_at_the_step_before(monkeypatch, tmp_path):
    whole = run_config(tmp_path / "whole", max_steps=2)
    train(whole)
    run = run_config(tmp_path / "run", max_steps=2, save=SaveConfig(save_steps=0))
    shortage = Shortage(at=30, after=1, times=99).watch(monkeypatch, fastrl.loss, "_backward")
    with shortage, pytest.raises(OutOfMemory) as found:
        train(run)
    assert shortage.num_failures == MAX_FAILURES
    lines = str(found.value).splitlines()
    assert lines[0].startswith("memory ran out 3 times in a step (can't allocate memory: you tried")
    assert "checkpoint-1 has what was before; go on with fastrl train --resume" in lines[0]
    assert any("activations" in line for line in lines)  # the plan's table
    assert 1 <= sum(line.startswith("- ") for line in lines) <= 3
    assert load_state(tmp_path / "run" / "checkpoint-1").memory == {}
    train(run, resume=True)
    assert_same_steps(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("mode", ["two_phase", "previous_norm"])
def test_weights_that_moved_in_the_backward_pass_cannot_be_put_back(monkeypatch, tmp_path, mode):
    monkeypatch.setattr(Expected, "advice", lambda *_: ["advice"])
    optim = OptimConfig(learning_rate=1e-3, in_backward=mode)
    run = run_config(tmp_path / "run", optim=optim, objective={}, max_steps=2)
    shortage = Shortage(at=3, after=40).watch(monkeypatch, LeanAdamW, "step_parameter")
    with shortage, pytest.raises(OutOfMemory, match="cannot be undone; go on from checkpoint-1 "):
        train(run)
    assert shortage.num_failures == 1
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1]
    train(run, resume=True)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]


def test_a_warm_start_and_an_evaluation_recover_as_well(monkeypatch, tmp_path, capsys):
    warm_start = WarmStartConfig(steps=2, batch_size=8)
    config = run_config(tmp_path / "run", warm_start=warm_start, objective={}, max_steps=1)
    with Shortage(at=2, after=1).watch(monkeypatch, fastrl.warm_start, "supervised_pass_loss"):
        train(config)
    shown = capsys.readouterr().out
    assert "warm start step 2: out of memory: can't allocate memory" in shown
    small = rows_of(tmp_path / "run")[0]["memory/max_tokens_per_pass"]
    monkeypatch.undo()
    # The first call compares the engine with the trainer.
    with Shortage(at=50, after=1).watch(monkeypatch, NativeEngine, "_advance"):
        train(dataclasses.replace(config, output_dir=str(tmp_path / "other")))
    shown = capsys.readouterr().out
    assert "evaluation: out of memory: can't allocate memory" in shown
    row = rows_of(tmp_path / "other")[0]
    assert small < row["memory/max_tokens_per_pass"] == WIDE
    assert row["memory/kv_cache_gib"] > 0


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (RuntimeError(MESSAGE), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("the reward 'x' failed in its own process:\nMemoryError: bad_alloc"), False),
        (RuntimeError("shapes do not match"), False),
        (InputError("out of memory, says a user"), False),
    ],
)
def test_what_says_that_there_is_no_memory(error, found):
    assert is_out_of_memory(error) is found
    if found:
        assert reason_of(error)


def test_halving_starts_from_what_was_needed_and_ends_at_what_must_fit(monkeypatch):
    monkeypatch.setattr("fastrl.memory.recovery.free_memory", lambda device: None)
    recovery = Recovery(1 << 20, 100, torch.device("cpu"))
    recovery.begin()
    recovery.largest_pass = 3000.5
    seen = []

    def attempt():
        seen.append(recovery.max_tokens_per_pass)
        raise MemoryError

    with pytest.raises(OutOfMemory):
        recovery.redone(attempt, can_redo=lambda: True)
    assert seen == [1 << 20, 1500, 750]
    recovery.largest_pass = 150
    recovery.begin()
    recovery.max_tokens_per_pass = 150
    with pytest.raises(OutOfMemory):
        recovery.redone(attempt, can_redo=lambda: True)
    assert seen[3:] == [150, 100, 100]
    with pytest.raises(MemoryError):
        recovery.redone(attempt, can_redo=lambda: False)


def test_a_size_that_the_user_sets_anew_is_the_users():
    first = Recovery(4096, 100, torch.device("cpu"))
    assert first.state_dict() == {}
    first.max_tokens_per_pass, first.kv_cache_gib = 1024, 0.5
    state = first.state_dict()
    same = Recovery(4096, 100, torch.device("cpu"))
    same.load_state_dict(state)
    assert (same.max_tokens_per_pass, same.kv_cache_gib) == (1024, 0.5)
    assert same.state_dict() == state
    other = Recovery(3000, 100, torch.device("cpu"))
    other.load_state_dict(state)
    assert (other.max_tokens_per_pass, other.kv_cache_gib) == (3000, 0.5)
    empty = Recovery(4096, 100, torch.device("cpu"))
    empty.load_state_dict({})
    assert empty.max_tokens_per_pass == 4096


def test_the_smallest_pass_holds_one_completion_with_its_rows():
    assert smallest_pass(10, 5, 0.0) == 14
    assert smallest_pass(10, 5, 0.5) == 17
