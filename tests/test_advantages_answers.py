"""Advantages that need answers, references, budgets or tool calls besides the rewards."""

import itertools
import math
import statistics

import pytest
import torch

from fastrl.advantages import (
    answer_entropies,
    baseline_centred,
    baseline_whitened,
    consistency_blended,
    group_centred,
    group_relative,
    log_mean_exp_value,
    set_relative,
    uncertainty_scaled,
)
from fastrl.advantages.additions import budget_margin, early_tool_calls, reference_margin
from fastrl.advantages.baselines import reference_value_centred

GROUPS = torch.tensor([3, 0, 0, 3, 0, 3, 1, 0, 3])  # 0 and 3 have four each, 1 has one
CLUSTERS = torch.tensor([9, 2, 7, 9, 2, 9, 4, -5, 2])
REWARDS = torch.rand(9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def members(group: int) -> list[int]:
    return [i for i in range(9) if GROUPS[i] == group]


def entropy_of(group: int) -> float:
    answers = [int(CLUSTERS[i]) for i in members(group)]
    shares = [answers.count(answer) / len(answers) for answer in set(answers)]
    return -sum(share * math.log(share) for share in shares)


def test_entropies_of_answers():
    expected = [entropy_of(int(group)) for group in GROUPS]
    assert answer_entropies(GROUPS, CLUSTERS).tolist() == pytest.approx(expected, abs=1e-12)
    assert expected[0] == pytest.approx(0.562335, abs=1e-6)  # three of four agree


def test_consistency_blends_the_group_with_the_prompts():
    prompts = {g: statistics.fmean(float(REWARDS[i]) for i in members(g)) for g in (0, 1, 3)}
    mean, std = statistics.fmean(prompts.values()), statistics.stdev(prompts.values())
    local = group_relative(REWARDS, GROUPS)
    expected = []
    for i, group in enumerate(GROUPS.tolist()):
        weight = 1 / (1 + math.exp(-20 * (entropy_of(group) - 1.0)))
        shared = (prompts[group] - mean) / (std + 1e-4)
        expected.append(weight * float(local[i]) + (1 - weight) * shared)
    advantages = consistency_blended(REWARDS, GROUPS, CLUSTERS, entropy_threshold=1.0)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)


def test_consistency_with_all_the_weight_on_the_group_is_group_relative():
    advantages = consistency_blended(REWARDS, GROUPS, CLUSTERS, entropy_threshold=-100.0)
    assert torch.equal(advantages, group_relative(REWARDS, GROUPS))


def test_consistency_of_a_single_prompt_compares_it_with_nothing():
    one, same = torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    advantages = consistency_blended(REWARDS, one, same)
    weight = 1 / (1 + math.exp(20 * 1.5))
    torch.testing.assert_close(advantages, weight * group_relative(REWARDS, one), **EXACT)


def test_uncertain_prompts_move_less():
    local = group_relative(REWARDS, GROUPS)
    factors = [1 - 0.8 * entropy_of(g) / math.log(max(len(members(g)), 2)) for g in GROUPS.tolist()]
    expected = [factor * float(a) for factor, a in zip(factors, local, strict=True)]
    advantages = uncertainty_scaled(REWARDS, GROUPS, CLUSTERS, strength=0.8)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(uncertainty_scaled(REWARDS, GROUPS, CLUSTERS, strength=0.0), local)
    pairs = torch.tensor([0, 0, 1, 1])  # the first prompt has two answers, the second one
    halved = uncertainty_scaled(REWARDS[:4], pairs, torch.tensor([0, 1, 5, 5]))
    factors = torch.tensor([0.5, 0.5, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(halved, group_relative(REWARDS[:4], pairs) * factors, **EXACT)


def test_advantage_of_all_sets():
    expected = [0.0] * 9
    for group in (0, 3):
        sets = list(itertools.combinations(members(group), 3))
        scores = [
            statistics.fmean(float(REWARDS[i]) for i in s) * len({int(CLUSTERS[i]) for i in s}) / 3
            for s in sets
        ]
        for i in members(group):
            own = [score for s, score in zip(sets, scores, strict=True) if i in s]
            expected[i] = statistics.fmean(own) - statistics.fmean(scores)
    advantages = set_relative(REWARDS, GROUPS, CLUSTERS, generator(), set_size=3)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)


def test_sets_of_one_are_group_centred():
    groups = torch.arange(9) // 3
    advantages = set_relative(REWARDS, groups, CLUSTERS, generator(), set_size=1)
    torch.testing.assert_close(advantages, group_centred(REWARDS, groups), **EXACT)


def test_random_sets_are_reproducible_and_approach_all_of_them():
    rewards = torch.rand(12, generator=generator(), dtype=torch.float64)
    groups, clusters = torch.zeros(12, dtype=torch.int64), torch.arange(12) % 5
    every = set_relative(rewards, groups, clusters, generator(), set_size=3, num_sets=220)
    some = [
        set_relative(rewards, groups, clusters, generator(), set_size=3, num_sets=219)
        for _ in range(2)
    ]
    assert torch.equal(some[0], some[1])
    assert 0 < (some[0] - every).abs().max() < 0.15


def test_a_group_without_two_sets_teaches_nothing():
    assert not set_relative(REWARDS, GROUPS, CLUSTERS, generator(), set_size=4).any()
    with pytest.raises(ValueError, match="at least 1, got 0 and 128"):
        set_relative(REWARDS, GROUPS, CLUSTERS, generator(), set_size=0)


def test_margin_over_the_reference():
    ref_rewards = REWARDS + torch.tensor([0, 0.1, 0.5, -0.1, -0.5, 0, 0.2, -0.28, 1.0]).double()
    local = group_relative(REWARDS, GROUPS)
    expected = [
        float(a) + min(max(float(r - q), -0.2), 0.28)
        for a, r, q in zip(local, REWARDS, ref_rewards, strict=True)
    ]
    advantages = reference_margin(REWARDS, GROUPS, ref_rewards)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(reference_margin(REWARDS, GROUPS, REWARDS), local)


def test_margin_of_a_budget():
    budgets = torch.tensor([512, 512, 2048, 1024, 512, 512, 512, 2048, 1024])
    local = group_relative(REWARDS, GROUPS)
    expected = []
    for i, group in enumerate(GROUPS.tolist()):
        shared = [float(REWARDS[j]) for j in members(group) if budgets[j] == budgets[i]]
        worth = 4 * math.cos(math.pi * int(budgets[i]) / (2 * 4096))
        expected.append(statistics.fmean(shared) - worth + float(local[i]))
    advantages = budget_margin(REWARDS, GROUPS, budgets, 4096)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)


def test_early_tool_calls_are_worth_more():
    rewards = torch.tensor([1.0, 1, 1, 0, 0, 1, 1, 1], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    lengths = torch.tensor([40, 80, 60, 50, 30, 20, 9, 9])
    positions = torch.tensor([10, 20, 70, 5, -1, -1, 2, 8])
    local = group_relative(rewards, groups)
    mean_position, mean_length = (10 + 20 + 70) / 3, (40 + 80 + 60) / 3
    expected = local.tolist()
    for i in (0, 1, 2):
        bound = 0.7 * abs(expected[i])
        term = -2.0 * (int(positions[i]) - mean_position) / mean_length
        expected[i] += min(max(term, -bound), bound)
    advantages = early_tool_calls(rewards, groups, lengths, positions)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(advantages.sign(), local.sign())
    assert not advantages[6:].any()  # all correct: no advantage, so nothing to shape


def test_given_baselines():
    baselines = REWARDS.flip(0)
    differences = [float(r - b) for r, b in zip(REWARDS, baselines, strict=True)]
    mean, std = statistics.fmean(differences), statistics.stdev(differences)
    expected = [(difference - mean) / (std + 1e-8) for difference in differences]
    assert baseline_centred(REWARDS, baselines).tolist() == differences
    whitened = baseline_whitened(REWARDS, baselines)
    assert whitened.tolist() == pytest.approx(expected, abs=1e-12)
    assert not baseline_whitened(REWARDS[:1], baselines[:1]).any()


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.0, 0.0), (0.125, 0.293513), (0.25, 0.477229), (0.5, 0.716890), (1.0, 1.0)],
)
def test_golden_values_under_a_penalty(rate, expected):
    rewards = (torch.arange(8) < 8 * rate).double()
    value = log_mean_exp_value(rewards, torch.zeros(8, dtype=torch.int64))
    assert value.item() == pytest.approx(expected, abs=1e-6)
    closed_form = 0.5 * math.log(1 + rate * (math.exp(2) - 1))
    assert value.item() == pytest.approx(closed_form, abs=1e-12)


def test_value_of_ragged_prompts():
    values = log_mean_exp_value(REWARDS, GROUPS, beta=0.3)
    expected = [
        0.3 * math.log(statistics.fmean(math.exp(float(REWARDS[i]) / 0.3) for i in members(g)))
        if members(g)
        else 0.0
        for g in range(4)
    ]
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


def test_value_lies_between_mean_and_maximum_and_falls_with_beta():
    betas = (1e-9, 1e-6, 1e-3, 0.1, 1.0, 10.0, 1e6, 1e12)
    values = torch.stack([log_mean_exp_value(REWARDS, GROUPS, beta=beta) for beta in betas])
    mean = log_mean_exp_value(REWARDS, GROUPS, beta=0.0)
    largest = [max((float(REWARDS[i]) for i in members(g)), default=0.0) for g in range(4)]
    assert values[0].tolist() == values[1].tolist() == largest
    assert (values.diff(dim=0) <= 1e-15).all()
    torch.testing.assert_close(values[-1], mean, **EXACT)
    torch.testing.assert_close(mean[0], REWARDS[GROUPS == 0].mean(), **EXACT)
    assert torch.isfinite(log_mean_exp_value(1e6 * REWARDS, GROUPS, beta=1e-3)).all()
    assert not log_mean_exp_value(REWARDS, GROUPS, beta=-1.0).any()


def test_advantage_over_the_value():
    ref_groups = torch.tensor([0, 0, 1, 3, 3, 3])
    ref_rewards = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)
    values = log_mean_exp_value(ref_rewards, ref_groups)
    advantages = reference_value_centred(REWARDS, GROUPS, ref_rewards, ref_groups)
    expected = [float(r - values[g]) for r, g in zip(REWARDS, GROUPS, strict=True)]
    assert advantages.tolist() == expected
    with pytest.raises(ValueError, match="got none for prompt 3"):
        reference_value_centred(REWARDS, GROUPS, ref_rewards[:3], ref_groups[:3])


def test_float32_is_kept():
    rewards = REWARDS.float()
    budgets, lengths = torch.full((9,), 512), torch.full((9,), 7)
    for advantages in (
        consistency_blended(rewards, GROUPS, CLUSTERS),
        uncertainty_scaled(rewards, GROUPS, CLUSTERS),
        set_relative(rewards, GROUPS, CLUSTERS, generator()),
        reference_margin(rewards, GROUPS, rewards),
        budget_margin(rewards, GROUPS, budgets, 4096),
        early_tool_calls(rewards, GROUPS, lengths, lengths),
        baseline_whitened(rewards, rewards.flip(0)),
        log_mean_exp_value(rewards, GROUPS),
    ):
        assert advantages.dtype == torch.float32
        assert torch.isfinite(advantages).all()
