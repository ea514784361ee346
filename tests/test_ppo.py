"""PPO with a value model against the formulas written out, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastrl.assembly import build_trainer
from fastrl.methods.adaptation import Adaptation
from fastrl.methods.record import use
from fastrl.mini_batches import cut, drawn_order
from fastrl.sampler import Scored
from fastrl.seeding import make_generator
from fastrl.types import Rewards
from tests.helpers import random_rollouts
from tests.helpers_methods import SIZES
from tests.helpers_updates import make_exact
from tests.test_training import tiny_config

PROMPTS = [5, 9, 2]
COMPLETIONS = [[4, 2, 1, 5], [3, 5, 5, 2], [5, 1, 1, 3]]
LENGTHS = [length for group in COMPLETIONS for length in group]
REWARDS = torch.tensor([1, 0, 0.5, 0, 0, 0, 1, 1, 1, 0.25, 0, 0], dtype=torch.float64)
FINISHED = torch.tensor([True] * 5 + [False] * 2 + [True] * 4 + [False])
P, G, B = 3, 4, 12
RATE = 1e-3
Rows = list[Tensor]


def made_trainer(method: str, *, seed: int = 0, **changes):
    """In float64, with a head that already says something."""
    config = tiny_config(
        "unused", method=method, prompts_per_step=P,
        objective={"parameters": {**SIZES.get(method, {}), "critic_learning_rate": RATE}},
        **changes,
    )  # fmt: skip
    trainer = build_trainer(config)
    make_exact(trainer, learning_rate=RATE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head = trainer.critic.trained
        head.weight.add_(torch.randn(head.weight.shape, generator=generator) / 20)
        head.bias.add_(0.3)
    trainer.reference = trainer.policy.frozen_copy()
    with torch.no_grad():
        for parameter in trainer.reference.model.parameters():
            parameter.mul_(1.02)
    return trainer


def scored() -> Scored:
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    generator = torch.Generator().manual_seed(7)
    logps = tuple(-2 - torch.rand(n, generator=generator) for n in LENGTHS)
    rollouts = dataclasses.replace(rollouts, rollout_logps=logps, finished=FINISHED)
    return Scored(rollouts, [], Rewards(REWARDS.float(), {}))


def run(trainer):
    step = scored()
    trainer.reward_scale = trainer.adaptation.see(step.rewards.total)
    inputs = trainer.inputs(step.rollouts, step.rewards, 0)
    packed = trainer.pack(step.rollouts, inputs)
    return trainer.updater.update(packed, 0, sampler_is_exact=False)


def dense(model, head=None) -> tuple[Rows, Rows]:
    """Log-probabilities and values of every completion by itself."""
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    logps, values = [], []
    for b, completion in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompts.token_ids[b // G]
        ids = torch.cat([prompt, completion])[None]
        states = model.model(input_ids=ids).last_hidden_state[0][len(prompt) - 1 : -1]
        table = model.lm_head(states).log_softmax(-1)
        logps.append(table.gather(1, completion[:, None])[:, 0])
        if head is not None:
            values.append(states @ head.weight[0] + head.bias[0])
    return logps, values


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a preset is made of, in its own words."""

    beta: float
    lambdas: tuple[float, float]  # of the policy's advantages and of the values' targets
    value_coef: float
    high: float = 1.2
    is_whitened: bool = False
    epsilon_value: float | None = 0.2
    adapts_to_length: bool = False
    is_truncated: bool = False  # the value after the end of an unfinished completion is the last
    to_sampler: bool = False
    positive_weight: float = 0.0
    reward: str = "as it is"


RECIPES = {
    "ppo": Recipe(0.05, (0.95, 0.95), 0.1, is_whitened=True),
    "ppo_rlvr": Recipe(0.05, (0.95, 0.95), 0.1, is_whitened=True, reward="verified"),
    "ppo_max": Recipe(0.01, (0.95, 0.95), 1.0, reward="scaled"),
    "vc_ppo": Recipe(0.0, (0.95, 1.0), 1.0),
    "vapo": Recipe(0.0, (1.0, 1.0), 1.0, high=1.28, adapts_to_length=True, positive_weight=0.1),
    "t_ppo": Recipe(
        0.0, (0.95, 1.0), 1.0, epsilon_value=None, is_truncated=True, to_sampler=True
    ),
}  # fmt: skip


def gae(rewards: Tensor, values: Tensor, decay: float, after: Tensor) -> Tensor:
    found = torch.zeros_like(rewards)
    later, next_value = torch.zeros((), dtype=torch.float64), after
    for t in reversed(range(len(rewards))):
        later = rewards[t] + next_value - values[t] + decay * later
        found[t], next_value = later, values[t]
    return found


def shaped(recipe: Recipe) -> Tensor:
    if recipe.reward == "verified":
        return torch.where(FINISHED, 10 * (REWARDS >= 1).double(), -10.0)
    return REWARDS / REWARDS.std() if recipe.reward == "scaled" else REWARDS


def estimate(recipe: Recipe, old: Rows, ref: Rows, values: Rows) -> tuple[Rows, Rows]:
    """Advantages and targets of the step."""
    advantages, targets = [], []
    for b, reward in enumerate(shaped(recipe)):
        rewards = -recipe.beta * (old[b] - ref[b])
        rewards = torch.cat([rewards[:-1], rewards[-1:] + reward])
        decay = recipe.lambdas[0]
        if recipe.adapts_to_length:
            decay = max(0.0, 1 - 1 / (0.05 * LENGTHS[b]))
        zero = torch.zeros((), dtype=torch.float64)
        goes_on = recipe.is_truncated and not FINISHED[b]
        advantages.append(gae(rewards, values[b], decay, values[b][-1] if goes_on else zero))
        targets.append(gae(rewards, values[b], recipe.lambdas[1], zero) + values[b])
    if recipe.is_whitened:
        flat = torch.cat(advantages)
        advantages = list(((flat - flat.mean()) / (flat.std() + 1e-8)).split(LENGTHS))
    return advantages, targets


def loss_of(recipe, rows, logps, values, old, old_values, advantages, targets) -> Tensor:
    num = sum(LENGTHS[b] for b in rows)
    learns = [b for b in rows if FINISHED[b] or not recipe.is_truncated]
    num_learned = sum(LENGTHS[b] for b in learns)
    correct = [b for b in rows if shaped(recipe)[b] > 0]
    num_correct = sum(LENGTHS[b] for b in correct)
    total = torch.zeros((), dtype=torch.float64)
    for b in rows:
        ratio, a = (logps[b] - old[b]).exp(), advantages[b]
        total = total - torch.minimum(ratio * a, ratio.clamp(0.8, recipe.high) * a).sum() / num
    for b in correct if recipe.positive_weight else []:
        total = total - recipe.positive_weight * logps[b].sum() / num_correct
    for b in learns:
        errors = (values[b] - targets[b]).square()
        if recipe.epsilon_value is not None:
            moved = (values[b] - old_values[b]).clamp(-recipe.epsilon_value, recipe.epsilon_value)
            errors = torch.maximum(errors, (old_values[b] + moved - targets[b]).square())
        total = total + recipe.value_coef * errors.sum() / 2 / num_learned
    return total


@pytest.mark.parametrize("budget", [4096, 22])
@pytest.mark.parametrize(("num_mini_batches", "num_iterations"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_the_one_written_out(name, num_mini_batches, num_iterations, budget):
    """Weights of the policy and of the head after all updates, each completion in its own row."""
    recipe = RECIPES[name]
    settings = {"num_mini_batches": num_mini_batches, "num_iterations": num_iterations}
    trainer = made_trainer(name, **settings)
    trainer.recovery.max_tokens_per_pass = budget
    truth = made_trainer(name)
    model, head = truth.policy.model, truth.critic.trained
    with torch.no_grad():
        old, old_values = dense(model, head)
        ref, _ = dense(truth.reference.model)
        advantages, targets = estimate(recipe, old, ref, old_values)
    if recipe.to_sampler:
        old = [x.double() for x in scored().rollouts.rollout_logps]
    optimizers = [
        torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
        for module in (model, head)
    ]
    generator = make_generator(torch.device("cpu"), 0, "mini_batches", 0)
    parts = cut(torch.arange(B) // G, num_mini_batches)
    for _ in range(num_iterations):
        for number in drawn_order(len(parts), generator):
            rows = parts[number].nonzero()[:, 0].tolist()
            logps, values = dense(model, head)
            args = (logps, values, old, old_values, advantages, targets)
            loss_of(recipe, rows, *args).backward()
            for module, optimizer in zip((model, head), optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    update = run(trainer)
    assert len(update.passes) > num_mini_batches or budget == 4096
    for found, expected in zip(
        (*trainer.policy.model.parameters(), *trainer.critic.trained.parameters()),
        (*model.parameters(), *head.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)


def test_without_discount_and_values_advantages_are_returns():
    """lambda 1, discount 1 and a value model that says 0: what is left is the sum of rewards."""
    trainer = made_trainer("ppo")
    with torch.no_grad():
        for parameter in trainer.critic.trained.parameters():
            parameter.zero_()
    trainer.method = dataclasses.replace(
        trainer.method, reward_shaping=None,
        advantage=use("generalized_advantages", gae_lambda=1.0),
        value_loss=use("squared_error", value_lambda=1.0),
    )  # fmt: skip
    inputs = run(trainer).inputs
    expected = REWARDS.float().double()[inputs.completion_index]
    torch.testing.assert_close(inputs.advantages, expected, rtol=0, atol=0)
    torch.testing.assert_close(inputs.value_targets, expected, rtol=0, atol=0)


def test_whitening_is_of_the_whole_step_whatever_the_parts():
    trainer = made_trainer("ppo", num_mini_batches=3)
    inputs = run(trainer).inputs
    assert float(inputs.advantages.mean()) == pytest.approx(0, abs=1e-12)
    assert float(inputs.advantages.std()) == pytest.approx(1, abs=1e-6)
    targets = inputs.value_targets  # these are not whitened
    assert abs(float(targets.std()) - 1) > 0.1


def test_the_penalty_of_rewards_follows_the_divergence_of_completions():
    trainer = made_trainer("ppo")
    trainer.method = dataclasses.replace(
        trainer.method, controllers=(use("adaptive_reward_kl", target=1e-3, horizon=100.0),)
    )
    trainer.adaptation = Adaptation(trainer.method)
    update = run(trainer)
    kl = sum(
        float((item.batch.old_logps - item.batch.ref_logps).sum()) for item in update.passes
    ) / B  # fmt: skip
    moved = trainer.adaptation.update(trainer.method, {"objective/kl": kl}, B)
    direction = 0.2 if kl > 1e-3 else -0.2
    assert moved.reward_shaping.parameters["beta"] == pytest.approx(
        0.05 * (1 + direction * B / 100)
    )
    again = Adaptation(trainer.method)
    restored = again.load_state_dict(trainer.adaptation.state_dict(), trainer.method)
    assert restored == moved


def test_the_spread_of_rewards_goes_on_from_a_checkpoint():
    trainer = made_trainer("ppo_max")
    first, second = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([3.0, 0.25])
    trainer.adaptation.see(first)
    state = trainer.adaptation.state_dict()
    expected = trainer.adaptation.see(second)
    again = Adaptation(trainer.method)
    again.load_state_dict(state, trainer.method)
    assert torch.equal(again.see(second), expected)
    assert float(expected) == pytest.approx(float(torch.cat([first, second]).std()))
