"""Updates that are not finite: nothing moves, they are counted, and too many end the run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fastrl.assembly import build_trainer
from fastrl.config import OptimConfig
from fastrl.errors import NotFiniteError
from fastrl.inspection import save_batch
from fastrl.learner import MAX_SKIPPED
from tests.test_training import tiny_config


def trainer_of(method: str = "grpo", **changes):
    objective = {}
    if method == "ppo":
        own = {"critic_learning_rate": 1e-2}
        objective = {"reward_shaping": "none", "parameters": own}
    return build_trainer(tiny_config("unused", method=method, objective=objective, **changes))


def state_of(trainer) -> list[torch.Tensor]:
    """Every number that an update may move."""
    modules = [trainer.policy.model]
    steppers = [trainer.learner.stepper]
    if trainer.critic is not None:
        modules.append(trainer.critic.trained)
        steppers.append(trainer.learner.critic_stepper)
    found = [x.detach().clone() for module in modules for x in module.parameters()]
    for stepper in steppers:
        for state in stepper.optimizer.state.values():
            found += [torch.as_tensor(x).clone() for _, x in sorted(state.items())]
    return found


def same(first, second) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def spoil_gradient(module, calls: set[int]) -> None:
    """Gradients of some backward passes, by number, are not finite anywhere."""
    parameter, seen = next(iter(module.parameters())), []

    def hook(gradient):
        seen.append(1)
        return gradient * float("nan") if len(seen) - 1 in calls else gradient

    parameter.register_hook(hook)


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_gradient_that_is_not_finite_moves_nothing(method):
    trainer = trainer_of(method)
    trainer.train_step(0)
    before = state_of(trainer)
    spoil_gradient(trainer.policy.model, {0})
    metrics = trainer.train_step(1).metrics
    assert metrics["skipped/non_finite"] == 1
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert same(before, state_of(trainer))
    assert all(parameter.grad is None for parameter in trainer.policy.model.parameters())
    metrics = trainer.train_step(2).metrics
    assert metrics["skipped/non_finite"] == 0
    assert not same(before, state_of(trainer))
    assert trainer.learner.skipped_in_a_row == 0


def test_a_gradient_of_the_value_model_that_is_not_finite_moves_nothing():
    trainer = trainer_of("ppo")
    trainer.train_step(0)
    before = state_of(trainer)
    spoil_gradient(trainer.critic.trained, {0})
    assert trainer.train_step(1).metrics["skipped/non_finite"] == 1
    assert same(before, state_of(trainer))


def test_a_loss_that_is_not_finite_moves_nothing():
    """The head says infinity for one token that is trained."""
    trainer = trainer_of("ppo")
    trainer.train_step(0)
    before = state_of(trainer)
    values, calls = trainer.critic.values, []

    def broken(plan, hidden_states):
        calls.append(1)
        found = values(plan, hidden_states)
        return found + float("inf") if torch.is_grad_enabled() else found

    trainer.critic.values = broken
    assert trainer.train_step(1).metrics["skipped/non_finite"] == 1
    assert calls
    assert same(before, state_of(trainer))


def test_only_the_part_that_is_not_finite_is_left_out():
    trainer = trainer_of("grpo", num_mini_batches=3, num_iterations=2)
    spoil_gradient(trainer.policy.model, {0, 4})
    update = trainer.train_step(0).metrics
    assert update["skipped/non_finite"] == 2
    assert update["grad_norm"] > 0
    assert all(torch.isfinite(x).all() for x in state_of(trainer))


def test_too_many_in_a_row_end_the_run_and_the_batch_is_kept(tmp_path):
    trainer = trainer_of("grpo", num_mini_batches=3)
    before = state_of(trainer)
    spoil_gradient(trainer.policy.model, set(range(100)))
    for step in range(MAX_SKIPPED // 3):
        assert trainer.train_step(step).metrics["skipped/non_finite"] == 3
    with pytest.raises(NotFiniteError, match="10 updates in a row were not finite"):
        trainer.train_step(MAX_SKIPPED // 3)
    assert same(before, state_of(trainer))
    path = save_batch(tmp_path, trainer)
    saved = load_file(path / "batch.safetensors")
    rollouts = trainer.last_sampled.trained.rollouts
    assert torch.equal(saved["completion_ids"], torch.cat(rollouts.completion_ids))
    assert saved["completion_lengths"].tolist() == rollouts.lengths.tolist()
    assert torch.equal(saved["rewards"], trainer.last_sampled.trained.rewards.total)
    rows = (path / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["completion"] for row in rows] == trainer.last_sampled.trained.texts


def test_the_count_goes_on_from_a_checkpoint():
    trainer = trainer_of()
    spoil_gradient(trainer.policy.model, {0})
    trainer.train_step(0)
    again = trainer_of()
    again.learner.load_state_dict(trainer.learner.state_dict())
    assert again.learner.skipped_in_a_row == trainer.learner.skipped_in_a_row == 1


@pytest.mark.parametrize("budget", [60, 4096])
@pytest.mark.parametrize("method", ["grpo", "gspo", "ppo"])
def test_steps_in_the_backward_pass_are_the_same_to_the_bit(method, budget):
    """Also where the layers have run before the loss, whose graph serves one backward pass only."""
    found = []
    for in_backward in ("off", "two_phase"):
        optim = OptimConfig(learning_rate=1e-3, in_backward=in_backward)
        trainer = trainer_of(method, optim=optim, max_tokens_per_pass=budget, num_iterations=2)
        metrics = [trainer.train_step(step).metrics for step in range(2)]
        # LeanAdamW keeps its moments by parameter: the weights say it all.
        modules = [trainer.policy.model, *([trainer.critic.trained] if trainer.critic else [])]
        weights = [x.detach().clone() for module in modules for x in module.parameters()]
        found.append((weights, [(row["loss"], row["grad_norm"]) for row in metrics]))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
