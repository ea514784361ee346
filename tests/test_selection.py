"""Selections against brute force and by hand: ragged groups in any order, ties, empty batches."""

import inspect
import itertools
import math
import statistics

import pytest
import torch

from fastrl.selection import (
    RESAMPLINGS,
    SELECTIONS,
    explorability,
    with_gradient,
    zero_spread_fraction,
)
from fastrl.selection.groups import (
    best,
    best_and_random,
    best_and_worst,
    first_of_completion,
    max_variance,
    max_variance_advantages,
    nonzero_std,
    pass_window,
    top_rewards,
)
from fastrl.selection.ranking import ranks

GROUPS = torch.tensor([2, 0, 2, 0, 1, 2, 0, 4])  # ragged, out of order, and no prompt 3
REWARDS = torch.tensor([1.0, 0.5, 0.0, 0.5, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept_rewards(rewards, groups, num_kept, group):
    kept = max_variance(rewards, groups, num_kept=num_kept)
    return sorted(rewards[kept & (groups == group)].tolist())


def test_ranks_go_down_and_ties_to_the_lower_index():
    assert ranks(REWARDS, GROUPS).tolist() == [0, 0, 2, 1, 0, 1, 2, 0]


def test_groups_that_scored_alike_are_dropped_and_a_group_of_one_is_not():
    kept = nonzero_std(REWARDS, GROUPS)
    assert kept.tolist() == [True, False, True, False, True, True, False, True]
    third = torch.full((6,), 0.1)
    assert not nonzero_std(third, torch.zeros(6, dtype=torch.int64)).any()


def test_zero_spread_fraction_counts_the_groups_that_exist():
    assert zero_spread_fraction(REWARDS, GROUPS) == 3 / 4  # two of them groups of one
    assert zero_spread_fraction(REWARDS[:3], GROUPS[:3]) == 1 / 2


def test_zero_advantage_needs_work_only_with_a_penalty():
    advantages, lengths = torch.tensor([0.0, 1.0, -1.0, 1.0]), torch.tensor([3, 3, 3, 0])
    without = with_gradient(advantages, lengths, has_penalty=False)
    assert without.tolist() == [False, True, True, False]
    assert with_gradient(advantages, lengths, has_penalty=True).tolist() == [True] * 3 + [False]


def test_pass_window_includes_both_ends():
    rewards = torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    kept = pass_window(rewards, groups, lowest=0.5, highest=1.0)
    assert kept.tolist() == [True] * 6 + [False] * 2
    kept = pass_window(rewards, groups, lowest=0.0, highest=0.5)
    assert kept.tolist() == [True] * 4 + [False] * 2 + [True] * 2
    assert pass_window(rewards, groups, lowest=1, highest=1, pass_threshold=0.0).all()
    with pytest.raises(ValueError, match="fractions"):
        pass_window(rewards, groups, lowest=0.8, highest=0.2)


def test_max_variance_golden_values():
    rewards = torch.tensor([0.1, 0.9, 0.5, 0.4, 0.8, 0.2], dtype=torch.float64)
    one_group = torch.zeros(6, dtype=torch.int64)
    assert kept_rewards(rewards, one_group, 4, 0) == [0.1, 0.2, 0.8, 0.9]
    binary = torch.tensor([1.0, 1, 1, 1, 1, 0])
    assert max_variance(binary, one_group, num_kept=4).tolist() == [True] * 3 + [False] * 2 + [True]


@pytest.mark.parametrize("levels", [2, 3, 1000])
def test_max_variance_agrees_with_all_subsets_in_every_ragged_group(levels):
    numbers = generator(levels)
    for _ in range(10):
        groups = torch.randint(0, 4, (24,), generator=numbers)
        rewards = torch.randint(0, levels, (24,), generator=numbers) / 10
        num_kept = int(torch.randint(1, 7, (), generator=numbers))
        for group in groups.unique().tolist():
            members = rewards[groups == group].double().tolist()
            size = min(num_kept, len(members))
            subsets = itertools.combinations(members, size)
            largest = max(statistics.pvariance(subset) for subset in subsets)
            kept = kept_rewards(rewards.double(), groups, num_kept, group)
            assert len(kept) == size
            assert statistics.pvariance(kept) == pytest.approx(largest, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_max_variance_keeps_the_first_best_split_of_a_scan_from_the_top(seed):
    """The published scan, in Python: all from the top first, then one less each time."""
    numbers = generator(seed)
    for _ in range(20):
        rewards = torch.randint(0, 4, (9,), generator=numbers).double()
        order = sorted(range(9), key=lambda i: (-float(rewards[i]), i))
        chosen, largest = None, -1.0
        for top in range(5, -1, -1):
            subset = order[:top] + order[len(order) - (5 - top) :]
            variance = statistics.pvariance(rewards[subset].tolist())
            if variance > largest + 1e-12:
                chosen, largest = subset, variance
        kept = max_variance(rewards, torch.zeros(9, dtype=torch.int64), num_kept=5)
        assert kept.nonzero().flatten().tolist() == sorted(chosen)


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e6])
def test_max_variance_of_equal_rewards_keeps_the_first(value):
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    kept = max_variance(torch.full((6,), value), groups, num_kept=2)
    assert kept.tolist() == [True] * 4 + [False] * 2


def test_max_variance_tells_close_splits_apart_at_any_level():
    """A pair of tops spreads 7e-5 less than one top alone."""
    rewards = torch.tensor([1.0, 1.0 - 1e-4, 0.0, 0.0], dtype=torch.float64)
    one_group = torch.zeros(4, dtype=torch.int64)
    for level in (0.0, 1e6, -1e6):
        kept = max_variance(rewards + level, one_group, num_kept=3)
        assert kept.tolist() == [True, False, True, True]


def test_max_variance_of_binary_rewards_is_as_balanced_as_possible():
    for successes, target in itertools.product(range(8), range(1, 8)):
        rewards = torch.tensor([1.0] * successes + [0.0] * (7 - successes))
        kept = rewards[max_variance(rewards, torch.zeros(7, dtype=torch.int64), num_kept=target)]
        balanced = {
            min(max(half, target - (7 - successes)), successes)
            for half in (target // 2, target - target // 2)
        }
        assert int(kept.sum()) in balanced


def test_keeping_all_keeps_everything():
    lengths = torch.ones(8, dtype=torch.int64)
    assert max_variance(REWARDS, GROUPS, num_kept=3).all()
    assert max_variance_advantages(REWARDS, GROUPS, lengths, num_kept=8, kept_fraction=1.0).all()
    assert top_rewards(REWARDS, GROUPS, num_kept=3).all()


def test_max_variance_advantages_in_groups_and_then_in_the_batch():
    advantages = [0.1, -0.2, 0.3, -0.4, 3.0, -2.0, 1.0, 0.0, 9.0]
    lengths = torch.tensor([2, 1, 1, 2, 1, 1, 1, 1, 0])  # the last has no tokens
    values = torch.tensor(advantages, dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    in_groups = max_variance_advantages(values, groups, lengths, num_kept=2, kept_fraction=1.0)
    assert in_groups.nonzero().flatten().tolist() == [2, 3, 4, 5]
    in_batch = max_variance_advantages(values, groups, lengths, num_kept=2, kept_fraction=0.25)
    assert in_batch.nonzero().flatten().tolist() == [4, 5]  # 2 of 8
    with pytest.raises(ValueError, match="kept_fraction"):
        max_variance_advantages(values, groups, lengths, kept_fraction=0.0)


@pytest.mark.parametrize("seed", range(5))
def test_max_variance_advantages_agrees_with_all_subsets(seed):
    """Both levels by trying every subset, on ragged groups with completions of no tokens."""
    numbers = generator(seed)
    groups = torch.randint(0, 3, (14,), generator=numbers)
    lengths = torch.randint(0, 4, (14,), generator=numbers)
    values = torch.randn(14, generator=numbers, dtype=torch.float64)
    kept = max_variance_advantages(values, groups, lengths, num_kept=3, kept_fraction=0.4)
    counted = [b for b in range(14) if lengths[b]]
    union: list[int] = []
    for group in set(groups.tolist()):
        members = [b for b in counted if groups[b] == group]
        subsets = itertools.combinations(members, min(3, len(members)))
        union += max(subsets, key=lambda s: statistics.pvariance(values[list(s)].tolist() or [0]))
    size = min(max(1, int(0.4 * len(counted) + 1e-9)), len(union))
    subsets = itertools.combinations(sorted(union), size)
    best_of_batch = max(subsets, key=lambda s: statistics.pvariance(values[list(s)].tolist()))
    assert kept.nonzero().flatten().tolist() == sorted(best_of_batch)


def test_best_of_each_group():
    assert best(REWARDS, GROUPS).nonzero().flatten().tolist() == [0, 1, 4, 7]
    assert top_rewards(REWARDS, GROUPS, num_kept=2).nonzero().flatten().tolist() == [
        0, 1, 3, 4, 5, 7,
    ]  # fmt: skip
    assert best_and_worst(REWARDS, GROUPS).nonzero().flatten().tolist() == [0, 1, 2, 4, 6, 7]


def test_best_and_random_draws_every_other_completion_alike():
    groups = torch.tensor([0, 1, 0, 0, 1])
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.5, 1.0])
    numbers, chosen = generator(), torch.zeros(5)
    for _ in range(400):
        kept = best_and_random(rewards, groups, numbers)
        assert kept[2]
        assert kept.tolist()[1::3] == [True, True]
        assert int(kept.sum()) == 4
        chosen += kept
    assert chosen[0] + chosen[3] == 400
    assert 150 < int(chosen[0]) < 250
    again = [best_and_random(rewards, groups, generator(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_only_finished_completions():
    finished = torch.tensor([True, False, True])
    assert SELECTIONS["finished_only"](finished).tolist() == [True, False, True]


def test_multiple_of_counts_completions_with_tokens():
    lengths = torch.tensor([3, 0, 1, 2, 5, 0, 1])
    kept = SELECTIONS["multiple_of"](lengths, multiple=2)
    assert kept.tolist() == [True, False, True, True, True, False, False]
    assert not SELECTIONS["multiple_of"](lengths, multiple=6).any()
    with pytest.raises(ValueError, match="multiple"):
        SELECTIONS["multiple_of"](lengths, multiple=0)


def test_bad_completions_that_the_policy_left_behind_are_dropped():
    lengths = torch.tensor([2, 2, 0, 1, 1, 1])
    index = torch.tensor([0, 0, 1, 1, 3, 4, 5])
    # One advantage a completion; an empty one has none.
    rollout = torch.full((7,), -1.0, dtype=torch.float64)
    logps = torch.tensor([-2.0, -1.1, -2.0, -1.1, -1.5, -math.inf, -3.0], dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0, 0.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    rule = SELECTIONS["off_policy_sequence_mask"]
    kept = rule(advantages, logps, rollout, index, lengths)
    # 0: mean 0.55, bad; 1: the same but good; 2: empty; 3: exactly 0.5; 4: infinite; 5: neutral
    assert kept.tolist() == [False, True, True, True, False, True]
    assert rule(advantages, logps, rollout, index, lengths, max_divergence=20.0).all()
    assert not rule(advantages, logps, rollout, index, lengths, max_divergence=0.4)[3]


def test_first_of_completion():
    lengths = torch.tensor([0, 2, 1, 0])
    assert first_of_completion(torch.tensor([5.0, 6, 7]), lengths).tolist() == [0, 5, 7, 0]
    assert first_of_completion(torch.zeros(0), lengths[:1]).tolist() == [0]


def test_explorability_is_advantage_times_entropy_without_noise():
    lengths, groups = torch.tensor([2, 1, 1, 0]), torch.tensor([0, 1, 0, 1])
    index = torch.tensor([0, 0, 1, 2])
    advantages = torch.tensor([2.0, 2.0, -1.0, -3.0], dtype=torch.float64)
    entropies = torch.tensor([0.5, 1.5, 4.0, 1.0], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    values = explorability(advantages, entropies, index, lengths, rewards, groups, max_entropy=2.0)
    assert values.tolist() == [(2 * 1.0 + 3 * 1.0) / 2, 0.0]  # prompt 1: wrong and 4 nats
    values = explorability(advantages, entropies, index, lengths, rewards, groups, max_entropy=9.0)
    assert values.tolist() == [2.5, (4.0 + 0.0) / 2]
    correct = torch.ones_like(rewards)
    values = explorability(advantages, entropies, index, lengths, correct, groups, max_entropy=2.0)
    assert values.tolist() == [2.5, 2.0]


RESAMPLING_SHARES = {
    "resampled_by_power": [4 / 9, 4 / 9, 1 / 9, 0],
    "resampled_extremes": [1 / 2, 1 / 2, 0, 0],
    "resampled_favouring_best": [0.1 / 0.7, 0.4 / 0.7, 0.1 / 0.7, 0.1 / 0.7],
}


@pytest.mark.parametrize("name", sorted(RESAMPLINGS))
def test_resampling_draws_in_proportion_to_the_weights(name):
    rewards = torch.tensor([-2.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    shares = torch.tensor(RESAMPLING_SHARES[name], dtype=torch.float64)
    copies = RESAMPLINGS[name](rewards.repeat(5000), generator())
    assert int(copies.sum()) == 20000
    drawn = copies.view(5000, 4).sum(dim=0) / 20000
    torch.testing.assert_close(drawn.double(), shares, atol=0.02, rtol=0)
    assert (drawn[shares == 0] == 0).all()
    assert torch.equal(copies, RESAMPLINGS[name](rewards.repeat(5000), generator()))


def test_resampling_of_zeros_takes_all_alike():
    copies = RESAMPLINGS["resampled_by_power"](torch.zeros(1000), generator())
    assert int(copies.sum()) == 1000
    assert int((copies > 0).sum()) > 500


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_a_batch_without_tokens(name):
    """Completions that are all empty: rules that judge tokens hold nothing against them."""
    data = {
        "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        "groups": torch.tensor([0, 0, 1, 1]),
        "lengths": torch.zeros(4, dtype=torch.int64),
        "finished": torch.ones(4, dtype=torch.bool),
        "completion_index": torch.zeros(0, dtype=torch.int64),
        "completion_advantages": torch.zeros(4),
        "logps": torch.zeros(0),
        "rollout_logps": torch.zeros(0),
        "generator": generator(),
    }
    needed = {
        "pass_window": {"lowest": 0.1, "highest": 0.9},
        "top_rewards": {"num_kept": 1},
        "multiple_of": {"multiple": 2},
    }
    parameters = inspect.signature(SELECTIONS[name]).parameters.values()
    given = [data[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY]
    kept = SELECTIONS[name](*given, **needed.get(name, {}))
    assert kept.dtype == torch.bool
    needs_tokens = name in {"multiple_of", "max_variance_advantages"}
    best_only = name in {"best", "top_rewards"}
    expected = [False] * 4 if needs_tokens else [True, not best_only] * 2
    assert kept.tolist() == expected


@pytest.mark.parametrize("rule", [max_variance, top_rewards])
def test_keeping_none_is_refused(rule):
    with pytest.raises(ValueError, match="num_kept of at least 1"):
        rule(REWARDS, GROUPS, num_kept=0)
