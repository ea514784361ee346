"""Advantages of tokens against loops over Python floats, bit for bit where the order is theirs."""

import math
import statistics

import pytest
import torch

from fastrl.advantages import (
    action_level_advantages,
    discounted_returns,
    generalized_advantages,
    group_centred,
    length_adaptive_advantages,
    optimal_token_baseline,
    truncated_advantages,
    value_targets,
    whiten,
    whitened_generalized_advantages,
    whitened_group_centred,
    whitened_returns,
)
from fastrl.advantages.scans import next_in_completion, positions, running_sums

LENGTHS = [3, 0, 1, 7, 2, 0, 5]  # empty completions in the middle; the last one has tokens
INDEX = torch.tensor([b for b, length in enumerate(LENGTHS) for _ in range(length)])
STARTS = [sum(LENGTHS[:b]) for b in range(len(LENGTHS))]
S = sum(LENGTHS)
GENERATOR = torch.Generator().manual_seed(4)
TOKEN_REWARDS = torch.rand(S, generator=GENERATOR, dtype=torch.float64)
VALUES = torch.rand(S, generator=GENERATOR, dtype=torch.float64)
REWARDS = torch.rand(7, generator=GENERATOR, dtype=torch.float64)
GROUPS = torch.tensor([1, 0, 1, 1, 0, 2, 0])
TERMINAL = torch.zeros(S, dtype=torch.float64)
for b, length in enumerate(LENGTHS):
    if length:
        TERMINAL[STARTS[b] + length - 1] = REWARDS[b]
EXACT = {"rtol": 1e-12, "atol": 1e-12}
GOLDEN_VALUES = torch.tensor([0.2, 0.5, 0.4, 0.7], dtype=torch.float64)
GOLDEN_REWARDS = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
ONE = torch.zeros(4, dtype=torch.int64)


def completions() -> list[list[int]]:
    return [list(range(STARTS[b], STARTS[b] + n)) for b, n in enumerate(LENGTHS)]


def backwards(differences: list[float], decays: list[float]) -> list[float]:
    """Solution of a_t = difference_t + decay_t a_{t+1} in every completion."""
    result = [0.0] * S
    for tokens in completions():
        following = 0.0
        for t in reversed(tokens):
            following = result[t] = differences[t] + decays[t] * following
    return result


def differences(discounts: list[float], finished: list[bool]) -> list[float]:
    result = [0.0] * S
    for b, tokens in enumerate(completions()):
        for t in tokens:
            if t != tokens[-1]:
                following = float(VALUES[t + 1])
            else:
                following = 0.0 if finished[b] else float(VALUES[t])
            result[t] = float(TOKEN_REWARDS[t]) + discounts[t] * following - float(VALUES[t])
    return result


def test_places_next_tokens_and_running_sums():
    assert positions(INDEX).tolist() == [t for n in LENGTHS for t in range(n)]
    expected = [
        float(VALUES[t + 1]) if t != tokens[-1] else 0.0 for tokens in completions() for t in tokens
    ]
    assert next_in_completion(VALUES, INDEX).tolist() == expected
    sums = []
    for tokens in completions():
        total = 0.0
        for t in tokens:
            total += float(VALUES[t])
            sums.append(total)
    assert running_sums(VALUES, INDEX).tolist() == sums


def test_discounted_returns():
    returns = discounted_returns(TOKEN_REWARDS, INDEX, discount=0.9)
    assert returns.tolist() == backwards(TOKEN_REWARDS.tolist(), [0.9] * S)
    to_the_power = [
        sum(0.9 ** (s - t) * float(TOKEN_REWARDS[s]) for s in tokens if s >= t)
        for tokens in completions()
        for t in tokens
    ]
    assert returns.tolist() == pytest.approx(to_the_power, abs=1e-12)


def test_whitening():
    mean, std = statistics.fmean(VALUES.tolist()), statistics.stdev(VALUES.tolist())
    expected = [(value - mean) / (std + 1e-8) for value in VALUES.tolist()]
    assert whiten(VALUES).tolist() == pytest.approx(expected, abs=1e-12)
    assert whiten(VALUES).sum().abs() < 1e-12
    for dtype in (torch.float32, torch.float64):
        assert not whiten(torch.full((1000,), 0.7, dtype=dtype)).any()
        assert not whiten(torch.full((1,), 0.7, dtype=dtype)).any()
    assert whiten(torch.tensor([0.0, math.nan, 1.0])).isnan().all()


def test_whitened_returns_of_a_terminal_reward_are_whitened_broadcast_rewards():
    broadcast = whiten(REWARDS[INDEX])
    torch.testing.assert_close(whitened_returns(TERMINAL, INDEX), broadcast, **EXACT)
    without_critic = whitened_generalized_advantages(
        TERMINAL, torch.zeros_like(TERMINAL), INDEX, gae_lambda=1.0
    )
    torch.testing.assert_close(without_critic, broadcast, **EXACT)
    discounted = whitened_returns(TOKEN_REWARDS, INDEX, discount=0.5)
    returns = discounted_returns(TOKEN_REWARDS, INDEX, discount=0.5)
    torch.testing.assert_close(discounted, whiten(returns), **EXACT)


def test_whitened_group_centred():
    centred = group_centred(REWARDS, GROUPS).tolist()
    tokens = [centred[b] for b in INDEX.tolist()]
    mean, std = statistics.fmean(tokens), statistics.stdev(tokens)
    expected = [(value - mean) / (std + 1e-8) for value in tokens]
    advantages = whitened_group_centred(REWARDS, GROUPS, INDEX)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)


def test_generalized_advantages():
    expected = backwards(differences([0.9] * S, [True] * 7), [0.9 * 0.8] * S)
    advantages = generalized_advantages(TOKEN_REWARDS, VALUES, INDEX, discount=0.9, gae_lambda=0.8)
    assert advantages.tolist() == expected
    whitened = whitened_generalized_advantages(
        TOKEN_REWARDS, VALUES, INDEX, discount=0.9, gae_lambda=0.8
    )
    assert torch.equal(whitened, whiten(advantages))


def test_golden_values_with_a_critic():
    advantages = generalized_advantages(GOLDEN_REWARDS, GOLDEN_VALUES, ONE)
    assert advantages.tolist() == pytest.approx([0.732962, 0.455750, 0.585, 0.3], abs=1e-6)
    targets = value_targets(GOLDEN_REWARDS, GOLDEN_VALUES, ONE, value_lambda=0.95)
    assert targets.tolist() == pytest.approx([0.932962, 0.955750, 0.985, 1.0], abs=1e-6)
    cut = truncated_advantages(
        torch.zeros_like(GOLDEN_VALUES), GOLDEN_VALUES, ONE, torch.tensor([False])
    )
    assert cut.tolist() == pytest.approx([0.475750, 0.185, 0.3, 0.0], abs=1e-6)


def test_without_discount_and_bias_the_advantage_is_return_minus_value():
    returns = discounted_returns(TOKEN_REWARDS, INDEX)
    advantages = generalized_advantages(TOKEN_REWARDS, VALUES, INDEX, gae_lambda=1.0)
    torch.testing.assert_close(advantages, returns - VALUES, **EXACT)
    torch.testing.assert_close(value_targets(TOKEN_REWARDS, VALUES, INDEX), returns, **EXACT)


def test_length_adaptive_advantages():
    lambdas = [max(0.0, 1 - 1 / (0.4 * LENGTHS[b])) for b in INDEX.tolist()]
    assert lambdas[0] > 0.1  # three tokens
    assert lambdas[3] == 0.0  # one token
    expected = backwards(differences([0.9] * S, [True] * 7), [0.9 * v for v in lambdas])
    advantages = length_adaptive_advantages(
        TOKEN_REWARDS, VALUES, INDEX, discount=0.9, length_factor=0.4
    )
    assert advantages.tolist() == pytest.approx(expected, abs=1e-14)


def test_truncated_advantages():
    finished = [True, False, False, True, False, True, False]
    expected = backwards(differences([0.9] * S, finished), [0.9 * 0.95] * S)
    advantages = truncated_advantages(
        TOKEN_REWARDS, VALUES, INDEX, torch.tensor(finished), discount=0.9
    )
    assert advantages.tolist() == expected
    all_finished = truncated_advantages(
        TOKEN_REWARDS, VALUES, INDEX, torch.ones(7, dtype=torch.bool)
    )
    assert torch.equal(all_finished, generalized_advantages(TOKEN_REWARDS, VALUES, INDEX))


def test_action_level_advantages():
    actions = [0, 0, 1, 0, 0, 0, 0, 1, 2, 2, 3, 4, 4, 0, 1, 1, 2, 2]
    assert len(actions) == S
    stays = [
        t != tokens[-1] and actions[t] == actions[t + 1] for tokens in completions() for t in tokens
    ]
    discounts = [1.0 if stay else 0.9 for stay in stays]
    expected = backwards(differences(discounts, [True] * 7), [0.8 * g for g in discounts])
    advantages = action_level_advantages(
        TOKEN_REWARDS, VALUES, INDEX, torch.tensor(actions), discount=0.9, gae_lambda=0.8
    )
    assert advantages.tolist() == pytest.approx(expected, abs=1e-15)
    undiscounted = action_level_advantages(
        TOKEN_REWARDS, VALUES, INDEX, torch.tensor(actions), discount=1.0
    )
    assert torch.equal(undiscounted, generalized_advantages(TOKEN_REWARDS, VALUES, INDEX))


def test_optimal_token_baseline():
    old_logps = -3 * VALUES
    sum_p2 = old_logps.exp() ** 2 + 0.1 * TOKEN_REWARDS
    returns = discounted_returns(TOKEN_REWARDS, INDEX).tolist()
    weights = [0.0] * S
    for tokens in completions():
        total = 0.0
        for t in tokens:
            total += 1 - 2 * math.exp(float(old_logps[t])) + float(sum_p2[t])
            weights[t] = total
    expected = []
    for b, tokens in enumerate(completions()):
        group = [other for other in range(7) if GROUPS[other] == GROUPS[b]]
        for place, t in enumerate(tokens):
            alive = [completions()[other][place] for other in group if LENGTHS[other] > place]
            baseline = sum(weights[s] * returns[s] for s in alive) / sum(weights[s] for s in alive)
            expected.append(returns[t] - baseline)
    advantages = optimal_token_baseline(TOKEN_REWARDS, old_logps, sum_p2, INDEX, GROUPS)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)
    assert advantages[STARTS[3] + 6] == 0  # the only token of its group at its place


def test_optimal_token_baseline_of_single_tokens_is_group_centred():
    index, constant = torch.arange(7), torch.full((7,), 0.3, dtype=torch.float64)
    for sum_p2 in (0.2, 2 * math.exp(0.3) - 1):  # the second one: no gradient, so no weight
        advantages = optimal_token_baseline(
            REWARDS, constant, torch.full_like(constant, sum_p2), index, GROUPS
        )
        torch.testing.assert_close(advantages, group_centred(REWARDS, GROUPS), **EXACT)
    assert advantages[5] == REWARDS[5]  # a group of one


def test_rounding_gives_no_negative_weight_to_a_certain_token():
    certain, index = torch.zeros(2, dtype=torch.float64), torch.arange(2)
    sum_p2 = torch.tensor([1 + 2**-51, 1 - 2**-53], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    groups = torch.zeros(2, dtype=torch.int64)
    advantages = optimal_token_baseline(rewards, certain, sum_p2, index, groups)
    assert advantages.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_a_completion_is_the_same_alone_and_in_a_batch(discount):
    whole = generalized_advantages(TOKEN_REWARDS, VALUES, INDEX, discount=discount)
    for tokens in filter(None, completions()):
        alone = generalized_advantages(
            TOKEN_REWARDS[tokens],
            VALUES[tokens],
            torch.zeros(len(tokens)).long(),
            discount=discount,
        )
        assert torch.equal(whole[tokens], alone)


def test_what_is_no_number_stays_in_its_completion():
    for bad in (math.nan, math.inf):
        values = VALUES.clone()
        values[STARTS[3] + 2] = bad
        advantages = generalized_advantages(TOKEN_REWARDS, values, INDEX)
        clean = generalized_advantages(TOKEN_REWARDS, VALUES, INDEX)
        assert not torch.isfinite(advantages[STARTS[3] : STARTS[3] + 3]).any()
        assert torch.equal(advantages[INDEX != 3], clean[INDEX != 3])


def test_no_tokens_at_all():
    none, index = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    nobody = torch.ones(7, dtype=torch.bool)
    for advantages in (
        whitened_returns(none, index),
        whitened_group_centred(REWARDS, GROUPS, index),
        optimal_token_baseline(none, none, none, index, GROUPS),
        whitened_generalized_advantages(none, none, index),
        length_adaptive_advantages(none, none, index),
        truncated_advantages(none, none, index, nobody),
        action_level_advantages(none, none, index, index),
    ):
        assert torch.equal(advantages, none)


def test_float32_is_kept_and_the_input_is_not_changed():
    rewards, values = TOKEN_REWARDS.float(), VALUES.float()
    before = rewards.clone(), values.clone()
    actions, finished = INDEX, torch.zeros(7, dtype=torch.bool)
    for advantages in (
        whitened_returns(rewards, INDEX, discount=0.9),
        whitened_generalized_advantages(rewards, values, INDEX),
        value_targets(rewards, values, INDEX),
        length_adaptive_advantages(rewards, values, INDEX),
        truncated_advantages(rewards, values, INDEX, finished),
        action_level_advantages(rewards, values, INDEX, actions),
        optimal_token_baseline(rewards, -values, values, INDEX, GROUPS),
    ):
        assert advantages.dtype == torch.float32
    assert torch.equal(rewards, before[0])
    assert torch.equal(values, before[1])


def test_bad_token_vectors_are_refused():
    with pytest.raises(ValueError, match=r"one length, got \(18,\), \(18,\), \(17,\)"):
        discounted_returns(TOKEN_REWARDS, INDEX[:-1])
    with pytest.raises(ValueError, match="non-decreasing"):
        discounted_returns(TOKEN_REWARDS, INDEX.flip(0))
