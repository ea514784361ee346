"""Advantages of completions against transcriptions, golden values and identities between them."""

import math
import statistics

import pytest
import torch

from fastrl.advantages import (
    batch_centred,
    batch_relative,
    batch_rms,
    beta_normalised,
    decoupled_rewards,
    good_policy_gradient,
    group_centred,
    group_relative,
    leave_one_out,
    length_weighted,
    mixed,
    pass_at_k_max,
    token_group_relative,
    whiten,
)

GOLDEN = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
ONE_GROUP = torch.zeros(8, dtype=torch.int64)
LENGTHS = torch.arange(10, 90, 10)
# Prompts 0, 2, 4 and 7 with 3, 4, 1 and 5 completions, in disorder; 0 and 7 are empty in places.
GROUPS = torch.tensor([2, 0, 7, 2, 0, 7, 4, 7, 2, 7, 0, 7, 2])
TOKENS = torch.tensor([3, 0, 5, 1, 2, 4, 6, 0, 9, 1, 3, 2, 7])
REWARDS = torch.rand(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def companions(i: int) -> list[int]:
    return [j for j in range(13) if GROUPS[j] == GROUPS[i]]


def mean_and_std(i: int) -> tuple[float, float]:
    """Of the group of completion i: a group of one has mean 0 and standard deviation 1."""
    rewards = [float(REWARDS[j]) for j in companions(i)]
    if len(rewards) == 1:
        return 0.0, 1.0
    return sum(rewards) / len(rewards), statistics.stdev(rewards)


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-12
    )


def test_transcriptions_of_the_group_baselines():
    relative, centred, left_out, in_batch, rms, policy = [], [], [], [], [], []
    batch_std = statistics.stdev(REWARDS.tolist())
    for i, reward in enumerate(REWARDS.tolist()):
        mean, std = mean_and_std(i)
        others = [float(REWARDS[j]) for j in companions(i) if j != i]
        relative.append((reward - mean) / (std + 1e-4))
        centred.append(reward - mean)
        left_out.append(reward - (sum(others) / len(others) if others else 0.0))
        in_batch.append((reward - mean) / (batch_std + 1e-4))
        policy.append((reward - mean) * 13 / 13 / 2.5)
    root_mean_square = math.sqrt(sum(a * a for a in centred) / 13)
    rms = [a / (root_mean_square + 1e-4) for a in centred]
    close(group_relative(REWARDS, GROUPS), relative)
    close(group_centred(REWARDS, GROUPS), centred)
    close(leave_one_out(REWARDS, GROUPS), left_out)
    close(batch_relative(REWARDS, GROUPS), in_batch)
    close(batch_rms(REWARDS, GROUPS), rms)
    close(good_policy_gradient(REWARDS, GROUPS, normaliser=2.5), policy)
    close(batch_centred(REWARDS), [r - sum(REWARDS.tolist()) / 13 for r in REWARDS.tolist()])


def test_transcription_of_the_best_of_a_group():
    expected = []
    for i, reward in enumerate(REWARDS.tolist()):
        others = [float(REWARDS[j]) for j in companions(i) if j != i] or [0.0]
        gap = max(reward - max(others), 0.0)
        expected.append(gap / (mean_and_std(i)[1] + 1e-6))
    close(pass_at_k_max(REWARDS, GROUPS), expected)
    assert (pass_at_k_max(REWARDS, GROUPS) > 0).sum() == 4
    assert not pass_at_k_max(GOLDEN, ONE_GROUP).any()  # two share the first place


def test_transcription_of_the_length_weighted_baselines():
    weighted, over_tokens = [], []
    for i, reward in enumerate(REWARDS.tolist()):
        of_tokens = [float(REWARDS[j]) for j in companions(i) for _ in range(int(TOKENS[j]))]
        if len(companions(i)) == 1:
            weighted.append(reward)
            over_tokens.append(reward / (1 + 1e-6))
            continue
        mean = sum(of_tokens) / len(of_tokens)
        weighted.append(reward - mean)
        over_tokens.append((reward - mean) / (statistics.pstdev(of_tokens) + 1e-6))
    close(length_weighted(REWARDS, GROUPS, TOKENS), weighted)
    close(token_group_relative(REWARDS, GROUPS, TOKENS), over_tokens)


def test_token_statistics_fall_back_to_completions_where_a_token_is_extreme():
    rewards = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1])
    advantages = token_group_relative(rewards, groups, torch.tensor([1, 100, 3, 5]))
    relative = group_relative(rewards, groups, std_epsilon=1e-6)
    assert torch.equal(advantages[:2], relative[:2])  # 10 standard deviations
    assert advantages[2] == pytest.approx(math.sqrt(5 / 3), abs=1e-5)
    empty = token_group_relative(rewards, groups, torch.tensor([0, 100, 0, 0]))
    assert not empty.any()  # one reward is left in the first group, none in the second


def test_transcription_of_the_mixed_advantage():
    expected = []
    for i, reward in enumerate(REWARDS.tolist()):
        mean, std = mean_and_std(i)
        rewards = [float(REWARDS[j]) for j in companions(i)]
        solved = sum(r > 0.5 for r in rewards) / len(rewards)
        weight = 1.0 if len(rewards) == 1 else 4 * solved * (1 - solved)
        by_mean = max(-10.0, min(10.0, (reward - mean) / (mean + 1e-6)))
        expected.append(weight * (reward - mean) / (std + 1e-6) + (1 - weight) * by_mean)
    close(mixed(REWARDS, GROUPS), expected)
    rare = torch.tensor([1.0] + [0.0] * 19, dtype=torch.float64)
    solved = 0.05
    relative = group_relative(rare, torch.zeros(20, dtype=torch.int64), std_epsilon=1e-6)
    weight = 4 * solved * (1 - solved)
    clipped = mixed(rare, torch.zeros(20, dtype=torch.int64))[0]  # 0.95 / 0.05 = 19 is too much
    assert clipped == pytest.approx(float(weight * relative[0] + (1 - weight) * 10))


def test_transcription_of_the_beta_normalised_advantage():
    rewards = (REWARDS > 0.4).double()
    rates = [
        statistics.fmean(rewards[group == GROUPS].tolist()) for group in GROUPS.unique().tolist()
    ]
    mean, variance = statistics.fmean(rates), statistics.variance(rates)
    strength = mean * (1 - mean) / variance - 1
    alpha, beta = 1 + strength * mean / 3, 1 + strength * (1 - mean) / 3
    assert min(alpha, beta) > 1
    expected = []
    for i, reward in enumerate(rewards.tolist()):
        rate = statistics.fmean(rewards[GROUPS[i] == GROUPS].tolist())
        if len(companions(i)) == 1:
            expected.append(reward)
        elif rate in (0.0, 1.0):
            expected.append(0.0)
        else:
            normaliser = math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)
            density = rate ** (alpha - 1) * (1 - rate) ** (beta - 1) / normaliser
            expected.append((reward - rate) / density)
    close(beta_normalised(rewards, GROUPS), expected)


def test_one_prompt_or_equal_rates_have_no_beta_density():
    assert torch.equal(beta_normalised(GOLDEN, ONE_GROUP), group_centred(GOLDEN, ONE_GROUP))
    groups = torch.arange(8) // 4
    rewards = torch.tensor([1.0, 0, 0, 0] * 2, dtype=torch.float64)
    assert torch.equal(beta_normalised(rewards, groups), group_centred(rewards, groups))
    far_apart = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    assert not beta_normalised(far_apart, groups).any()


def test_an_improbable_rate_is_not_amplified_without_bound():
    rewards = torch.full((102,), 0.5, dtype=torch.float64)
    rewards[:2] = torch.tensor([0.0, 2e-5])
    advantages = beta_normalised(rewards, torch.arange(102) // 2)
    assert advantages[:2].tolist() == pytest.approx([-10.0, 10.0])  # 1e-5 times at most 1e6
    assert not advantages[2:].any()


def test_transcription_of_the_decoupled_rewards():
    parts = torch.stack([REWARDS, 100 * REWARDS.flip(0), torch.full_like(REWARDS, math.nan)])
    parts[1, 5] = math.nan
    sums = []
    for i in range(13):
        total = 2.0 * float(group_relative(parts[0], GROUPS)[i])
        rewards = [float(parts[1, j]) for j in companions(i) if j != 5]
        if i != 5 and len(rewards) > 1:
            centred = float(parts[1, i]) - statistics.fmean(rewards)
            total += 0.5 * centred / (statistics.stdev(rewards) + 1e-4)
        elif i != 5:
            total += 0.5 * float(parts[1, i]) / (1 + 1e-4)
        sums.append(total)
    mean, std = statistics.fmean(sums), statistics.stdev(sums)
    expected = [(total - mean) / (std + 1e-4) for total in sums]
    close(decoupled_rewards(parts, GROUPS, weights=(2.0, 0.5, 1.0)), expected)
    with pytest.raises(ValueError, match="one value per reward, 3, got 1"):
        decoupled_rewards(parts, GROUPS, weights=(1.0,))


def test_the_scale_of_a_decoupled_reward_does_not_matter():
    parts = torch.stack([REWARDS, REWARDS.flip(0)])
    grown = torch.stack([REWARDS, 1000 * REWARDS.flip(0)])
    groups = torch.arange(13) // 5
    torch.testing.assert_close(
        decoupled_rewards(grown, groups, std_epsilon=0.0),
        decoupled_rewards(parts, groups, std_epsilon=0.0),
    )


def test_golden_values_of_one_group():
    def correct_and_wrong(advantages: torch.Tensor) -> list[float]:
        return advantages[:2].tolist()

    relative = group_relative(GOLDEN, ONE_GROUP, std_epsilon=0.0)
    rms = batch_rms(GOLDEN, ONE_GROUP, std_epsilon=0.0)
    by_length = length_weighted(GOLDEN, ONE_GROUP, LENGTHS)
    both = mixed(GOLDEN, ONE_GROUP, std_epsilon=0.0)
    population = both + 0.75 * (rms - relative)  # the golden value has the population's std
    assert correct_and_wrong(group_centred(GOLDEN, ONE_GROUP)) == [0.75, -0.25]
    assert correct_and_wrong(good_policy_gradient(GOLDEN, ONE_GROUP)) == [3.0, -1.0]  # 8 / 2
    for advantages, expected in [
        (leave_one_out(GOLDEN, ONE_GROUP), [0.857143, -0.285714]),
        (relative, [1.620185, -0.540062]),
        (rms, [1.732051, -0.577350]),
        (by_length, [0.861111, -0.138889]),
        (population, [2.049038, -0.683013]),
    ]:
        assert correct_and_wrong(advantages) == pytest.approx(expected, abs=1e-6)


def test_identities_between_estimators():
    exact = {"rtol": 1e-12, "atol": 1e-12}
    groups, sizes = torch.arange(12) // 4, 4
    rewards = REWARDS[:12]
    equal = torch.full((12,), 7)
    centred, relative = group_centred(rewards, groups), group_relative(rewards, groups)
    torch.testing.assert_close(
        leave_one_out(rewards, groups), centred * sizes / (sizes - 1), **exact
    )
    torch.testing.assert_close(length_weighted(rewards, groups, equal), centred, **exact)
    one = torch.zeros_like(groups)
    torch.testing.assert_close(batch_relative(rewards, one), group_relative(rewards, one), **exact)
    torch.testing.assert_close(
        batch_rms(rewards, groups, std_epsilon=0.0) * centred.square().mean().sqrt(),
        centred,
        **exact,
    )
    torch.testing.assert_close(
        token_group_relative(rewards, groups, equal, std_epsilon=0.0) * math.sqrt(3 / 4),
        group_relative(rewards, groups, std_epsilon=0.0),
        **exact,
    )
    half = torch.tensor([1.0, 0, 1, 0] * 3, dtype=torch.float64)
    torch.testing.assert_close(
        mixed(half, groups), group_relative(half, groups, std_epsilon=1e-6), **exact
    )
    for advantages in (centred, relative, leave_one_out(rewards, groups)):
        assert advantages.view(3, 4).sum(dim=1).abs().max() < 1e-12
    assert whiten(rewards).sum().abs() < 1e-12


def test_binary_rewards_under_the_standard_deviation():
    rate = 2 / 8
    population = batch_rms(GOLDEN, ONE_GROUP, std_epsilon=0.0)
    assert population[0] == pytest.approx(math.sqrt((1 - rate) / rate), abs=1e-12)
    assert population[1] == pytest.approx(-math.sqrt(rate / (1 - rate)), abs=1e-12)
    torch.testing.assert_close(
        group_relative(GOLDEN, ONE_GROUP, std_epsilon=0.0), population * math.sqrt(7 / 8)
    )
