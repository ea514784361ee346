"""A step in several optimizer steps: what each is, in which order, and what it costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastrl.aggregation import AGGREGATIONS
from fastrl.assembly import build_trainer
from fastrl.config import Config
from fastrl.methods import METHODS
from fastrl.methods.needs import requirements
from fastrl.methods.record import use
from fastrl.mini_batches import cut, drawn_order
from fastrl.sampler import Sampled, Scored
from fastrl.seeding import make_generator
from fastrl.trainer import Trainer
from fastrl.types import Rewards
from tests.helpers import random_rollouts
from tests.helpers_methods import SIZES
from tests.helpers_updates import make_exact
from tests.test_training import tiny_config

PROMPTS = [5, 9, 2, 7, 3]
COMPLETIONS = [[4, 2, 1, 5], [3, 5, 5, 2], [5, 1, 1, 3], [2, 2, 3, 4], [1, 5, 4, 2]]
LENGTHS = [length for group in COMPLETIONS for length in group]
REWARDS = [1, 0, 0.5, 0, 0, 0, 1, 1, 1, 0.25, 0, 0, 0.3, 0.2, 0, 1, 0, 1, 0.7, 0.1]
P, G, B, C = 5, 4, 20, 5
RATE = 1e-3
OBJECTIVES = {"grpo": {"beta": 0.04}}


def made_trainer(
    method: str, *, num_mini_batches: int, num_iterations: int = 1, **changes
) -> Trainer:
    """A trainer in float64, through torch's own AdamW."""
    config: Config = tiny_config(
        "unused", method=method, num_mini_batches=num_mini_batches, num_iterations=num_iterations,
        prompts_per_step=P, **changes,
    )  # fmt: skip
    objective = {"parameters": SIZES.get(method, {}), **config.objective}
    config = dataclasses.replace(config, objective=objective)
    trainer = build_trainer(config)
    make_exact(trainer, learning_rate=RATE)
    if "ref_logps" in requirements(trainer.method):
        trainer.reference = trainer.policy.frozen_copy()
        with torch.no_grad():
            for parameter in trainer.reference.model.parameters():
                parameter.mul_(1.05)
    return trainer


def given(trainer: Trainer) -> Sampled:
    """The same completions for everybody, with log-probabilities of a sampler that is far off."""
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    generator = torch.Generator().manual_seed(7)
    logps = tuple(-2 - torch.rand(n, generator=generator) for n in LENGTHS)
    rollouts = dataclasses.replace(rollouts, rollout_logps=logps)
    scored = Scored(rollouts, [], Rewards(torch.tensor(REWARDS), {}))
    return Sampled(scored, scored, 1, 0)


def run(trainer: Trainer, *, sampler_is_exact: bool = False):
    sampled = given(trainer)
    inputs = trainer.inputs(sampled.trained.rollouts, sampled.trained.rewards, 0)
    packed = trainer.pack(sampled.trained.rollouts, inputs)
    return trainer.updater.update(packed, 0, sampler_is_exact=sampler_is_exact)


def dense_logps(model) -> list[Tensor]:
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    found = []
    for b, completion in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompts.token_ids[b // G]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        table = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(table.gather(1, completion[:, None])[:, 0])
    return found


def clipped(logps, old, advantages, weights) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b, weight in weights.items():
        ratio = (logps[b] - old[b]).exp()
        a = advantages[b]
        total = total - (weight * torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)).sum()
    return total


def grpo(logps, old, ref, rows) -> Tensor:
    """GRPO as published, with its penalty: a mean over tokens of each completion of the part."""
    groups = torch.tensor(REWARDS, dtype=torch.float32).double().view(P, G)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    weights = {b: 1 / (len(rows) * LENGTHS[b]) for b in rows}
    delta = [logps[b] - ref[b] for b in range(B)]
    penalty = sum(((-delta[b]).exp() - 1 + delta[b]).mean() / len(rows) for b in rows)
    return clipped(logps, old, advantages.flatten(), weights) + 0.04 * penalty


def reinforce_pp(logps, old, ref, rows) -> Tensor:
    """REINFORCE++: returns of penalised token rewards, whitened over all tokens of the step."""
    returns = []
    rewards = torch.tensor(REWARDS, dtype=torch.float32).double()
    for b in range(B):
        token_rewards = -0.01 * (old[b] - ref[b])
        token_rewards = torch.cat([token_rewards[:-1], token_rewards[-1:] + rewards[b]])
        returns.append(token_rewards.flip(0).cumsum(0).flip(0))
    flat = torch.cat(returns)
    white = ((flat - flat.mean()) / (flat.std() + 1e-8)).split(LENGTHS)
    total = sum(LENGTHS[b] for b in rows)
    return clipped(logps, old, white, dict.fromkeys(rows, 1 / total))


def gspo(logps, old, ref, rows) -> Tensor:
    """The ratio of the geometric means, one for a completion."""
    groups = torch.tensor(REWARDS, dtype=torch.float32).double().view(P, G)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    total = torch.zeros((), dtype=torch.float64)
    for b in rows:
        ratio, a = (logps[b] - old[b]).mean().exp(), advantages.flatten()[b]
        surrogate = torch.minimum(ratio * a, ratio.clamp(1 - 3e-4, 1 + 4e-4) * a)
        total = total - surrogate / len(rows)
    return total


def dpo(logps, old, ref, rows) -> Tensor:
    """The best and the worst completion of each prompt of the part."""
    losses = []
    for p in sorted({b // G for b in rows}):
        group = REWARDS[p * G : p * G + G]
        best, worst = (p * G + group.index(f(group)) for f in (max, min))
        gap = (logps[best] - ref[best]).sum() - (logps[worst] - ref[worst]).sum()
        losses.append(-torch.nn.functional.logsigmoid(0.1 * gap))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("budget", [4096, 60])
@pytest.mark.parametrize("loss", [grpo, reinforce_pp, gspo, dpo], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("num_mini_batches", "num_iterations"), [(2, 1), (3, 2)])
def test_updates_are_those_written_out(loss, budget, num_mini_batches, num_iterations):
    """Each part by itself through torch's own AdamW, advantages of the whole step."""
    trainer = made_trainer(
        loss.__name__, num_mini_batches=num_mini_batches, num_iterations=num_iterations,
        max_tokens_per_pass=budget, objective=OBJECTIVES.get(loss.__name__, {}),
    )  # fmt: skip
    truth = made_trainer(
        loss.__name__, num_mini_batches=1, objective=OBJECTIVES.get(loss.__name__, {})
    )
    model = truth.policy.model
    with torch.no_grad():
        old = dense_logps(model)
        ref = dense_logps(truth.reference.model) if truth.reference is not None else old
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    generator = make_generator(torch.device("cpu"), 0, "mini_batches", 0)
    parts = cut(torch.arange(B) // G, num_mini_batches)
    orders = [drawn_order(len(parts), generator) for _ in range(num_iterations)]
    for order in orders:
        for number in order:
            optimizer.zero_grad()
            rows = parts[number].nonzero()[:, 0].tolist()
            loss(dense_logps(model), old, ref, rows).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    update = run(trainer)
    assert update.num_steps == num_mini_batches
    for (name, found), expected in zip(
        trainer.policy.model.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-7, msg=name)


def test_prompts_are_cut_evenly_and_groups_stay_whole():
    groups = torch.arange(7).repeat_interleave(3)
    parts = cut(groups, 3)
    assert torch.stack(parts).sum(0).tolist() == [1] * 21
    assert sorted(int(part.sum()) for part in parts) == [6, 6, 9]
    assert all(len(groups[part].unique()) * 3 == int(part.sum()) for part in parts)
    assert len(cut(groups, 100)) == 7
    assert cut(torch.zeros(0, dtype=torch.int64), 4) == []


def test_order_is_a_function_of_the_seed():
    def orders(seed):
        generator = torch.Generator().manual_seed(seed)
        return [drawn_order(6, generator) for _ in range(4)]

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)
    assert len({tuple(order) for order in orders(1)}) > 1
    assert all(sorted(order) == list(range(6)) for order in orders(1))


@pytest.mark.parametrize("aggregation", sorted(set(AGGREGATIONS) - {"sum", "fixed_constant"}))
def test_weights_are_normalised_over_the_part(aggregation):
    """The same completions weigh as much in a part as in a step that has no others."""
    trainer = made_trainer("grpo", num_mini_batches=5)
    trainer.method = dataclasses.replace(METHODS["grpo"], aggregation=use(aggregation))
    sampled = given(trainer).trained
    inputs = trainer.inputs(sampled.rollouts, sampled.rewards, 0)
    for part in trainer.pack(sampled.rollouts, inputs).parts:
        rows = part.rows.nonzero()[:, 0].tolist()
        lengths = [LENGTHS[b] for b in rows]
        found = torch.cat([item.batch.token_weights for item in part.passes])
        index = torch.cat([item.batch.completion_index for item in part.passes])
        own = torch.tensor(LENGTHS)[index].double()
        expected = {
            "token_mean": torch.full_like(own, 1 / sum(lengths)),
            "prompt_mean": torch.full_like(own, 1 / sum(lengths)),
            "sequence_mean": 1 / (G * own),
            "sequence_sum": torch.full_like(own, 1 / G),
            "constant": torch.full_like(own, 1 / (G * C)),
        }[aggregation]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("method", "is_exact", "num_iterations", "runs"),
    [
        ("grpo", True, 1, 3),  # the sampler's are the old ones: each part runs once
        ("grpo", False, 1, 3 + 2),  # those of the two parts that are not first take a pass
        ("grpo", False, 2, 6 + 2),  # the first part's are those of its first update
        ("dppo_tv", False, 2, 6),  # the old policy is the sampler's
        ("reinforce_pp", False, 1, 3 + 3),  # advantages come from all tokens, and ratios with them
        ("reinforce_pp", False, 2, 6 + 3),
        ("gspo", True, 1, 3 + 0),  # one pass: its layers serve ratios and loss
    ],
)
def test_old_logps_take_a_pass_only_where_nothing_else_has_them(
    method, is_exact, num_iterations, runs
):
    """How often the layers of the policy see a pass, with three parts of one pass each."""
    trainer = made_trainer(method, num_mini_batches=3, num_iterations=num_iterations)
    trainer.reference = None
    trainer.method = dataclasses.replace(trainer.method, reward_shaping=None, penalties=())
    hidden_states, seen = trainer.policy.hidden_states, []

    def counted(plan):
        seen.append(plan)
        return hidden_states(plan)

    trainer.policy.hidden_states = counted
    update = run(trainer, sampler_is_exact=is_exact)
    assert update.num_steps == 3
    assert len(seen) == runs


@pytest.mark.parametrize("method", ["grpo", "reinforce_pp", "gspo"])
def test_first_update_is_on_policy(method):
    """Ratio 1 by construction: the part that comes first has no old log-probabilities."""
    trainer = made_trainer(method, num_mini_batches=2)
    update = run(trainer)
    first = drawn_order(2, make_generator(torch.device("cpu"), 0, "mini_batches", 0))[0]
    rows = cut(torch.arange(B) // G, 2)[first]
    ratios = {0: [], 1: []}
    for item, out in zip(update.passes, update.losses, strict=True):
        is_first = bool(rows[item.batch.completion_index].all())
        ratios[is_first].append((out.logps - item.batch.old_logps).abs().max())
    assert max(ratios[True]) == 0
    assert max(ratios[False]) > 1e-4


def test_a_gap_between_sampler_and_trainer_is_measured_before_any_update():
    alone, parts = (made_trainer("grpo", num_mini_batches=n) for n in (1, 3))
    whole, found = run(alone), run(parts, sampler_is_exact=True)
    assert found.sampler_gap["sampling/sampling_logp_difference/max"] > 0.1
    first = drawn_order(3, make_generator(torch.device("cpu"), 0, "mini_batches", 0))[0]
    rows = cut(torch.arange(B) // G, 3)[first]
    gaps = []
    for item, out in zip(whole.passes, whole.losses, strict=True):
        gap = (out.logps - item.batch.rollout_logps).abs()
        gaps.append(gap[rows[item.batch.completion_index]])
    expected = float(torch.cat(gaps).mean())
    assert found.sampler_gap["sampling/sampling_logp_difference/mean"] == pytest.approx(expected)


@pytest.mark.parametrize("method", ["d3s", "tis", "pods", "vespo", "gvpo", "dapo"])
def test_methods_of_every_kind_take_several_updates(method):
    """Dropped tokens, corrections, selections, slopes from the batch and groups of losses."""
    trainer = made_trainer(method, num_mini_batches=3, num_iterations=2, max_tokens_per_pass=60)
    before = [parameter.detach().clone() for parameter in trainer.policy.model.parameters()]
    update = run(trainer)
    assert update.num_steps == 3
    assert update.num_skipped == 0
    after = list(trainer.policy.model.parameters())
    assert all(torch.isfinite(weight).all() for weight in after)
    assert any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
