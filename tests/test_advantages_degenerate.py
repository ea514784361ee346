"""Advantages of completions where there is nothing to compare, or something that is no number."""

import math

import pytest
import torch

from fastrl.advantages import (
    ADVANTAGES,
    NEEDS_GROUPS,
    PER_TOKEN,
    batch_relative,
    batch_rms,
    beta_normalised,
    good_policy_gradient,
    group_centred,
    group_relative,
    leave_one_out,
    length_weighted,
    mixed,
    pass_at_k_max,
)

BINARY = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
ONE_GROUP = torch.zeros(8, dtype=torch.int64)
GROUPS = torch.tensor([2, 0, 7, 2, 0, 7, 4, 7, 2, 7, 0, 7, 2])
REWARDS = torch.rand(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SIMPLE = {
    "group_relative": group_relative,
    "group_centred": group_centred,
    "leave_one_out": leave_one_out,
    "batch_relative": batch_relative,
    "batch_rms": batch_rms,
    "good_policy_gradient": good_policy_gradient,
    "pass_at_k_max": pass_at_k_max,
    "mixed": mixed,
    "beta_normalised": beta_normalised,
}
WITHIN_GROUPS = ("group_relative", "group_centred", "leave_one_out", "pass_at_k_max", "mixed")


@pytest.mark.parametrize("name", WITHIN_GROUPS)
def test_groups_do_not_see_each_other(name):
    whole = SIMPLE[name](REWARDS, GROUPS)
    for group in GROUPS.unique().tolist():
        members = group == GROUPS
        alone = SIMPLE[name](REWARDS[members], torch.zeros_like(GROUPS[members]))
        assert torch.equal(whole[members], alone)


@pytest.mark.parametrize("name", WITHIN_GROUPS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_seen_and_stays_in_its_group(name, bad):
    rewards = REWARDS.clone()
    rewards[5] = bad
    advantages, clean = SIMPLE[name](rewards, GROUPS), SIMPLE[name](REWARDS, GROUPS)
    assert not torch.isfinite(advantages[GROUPS == 7]).all()
    assert torch.equal(advantages[GROUPS != 7], clean[GROUPS != 7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(SIMPLE))
def test_equal_rewards_give_exactly_zero(name, dtype):
    rewards = torch.full((6,), 0.7, dtype=dtype)
    advantages = SIMPLE[name](rewards, torch.tensor([0, 1, 0, 1, 0, 1]))
    assert torch.equal(advantages, torch.zeros(6, dtype=dtype))


@pytest.mark.parametrize("name", sorted(SIMPLE))
def test_float32_is_kept_and_the_input_is_not_changed(name):
    rewards = REWARDS.float()
    before = rewards.clone()
    advantages = SIMPLE[name](rewards, GROUPS)
    assert advantages.dtype == torch.float32
    assert torch.equal(rewards, before)
    expected = SIMPLE[name](rewards.double(), GROUPS)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(SIMPLE) - {"batch_relative", "batch_rms"}))
def test_a_group_of_one_keeps_its_reward(name):
    rewards = torch.tensor([0.25, 1.0, 0.0], dtype=torch.float64)
    advantage = SIMPLE[name](rewards, torch.tensor([5, 1, 1]))[0]
    assert advantage == pytest.approx(0.25 * (3 / 2 if name == "good_policy_gradient" else 1), 1e-3)


def test_rounding_noise_is_not_amplified():
    rewards = torch.full((4,), 0.3, dtype=torch.float64) + 1e-12 * torch.arange(4)
    groups = torch.zeros(4, dtype=torch.int64)
    for name in ("group_relative", "batch_relative", "batch_rms"):
        assert not SIMPLE[name](rewards, groups).any()


def test_rewards_that_an_estimator_cannot_use_are_refused():
    with pytest.raises(ValueError, match=r"at least 0, got -1\.0"):
        mixed(BINARY - 1, ONE_GROUP)
    with pytest.raises(ValueError, match=r"from 0 to 1, got 0\.0 to 2\.0"):
        beta_normalised(2 * BINARY, ONE_GROUP)
    with pytest.raises(ValueError, match=r"vectors of one length, got \(8,\), \(7,\)"):
        group_relative(BINARY, ONE_GROUP[:7])
    with pytest.raises(ValueError, match="vectors of one length"):
        length_weighted(BINARY, ONE_GROUP, ONE_GROUP[:7])


def test_the_tables_name_one_another():
    assert set(ADVANTAGES) > NEEDS_GROUPS
    assert set(ADVANTAGES) > PER_TOKEN
    assert all(ADVANTAGES[name] is function for name, function in SIMPLE.items())
    assert "batch_centred" not in NEEDS_GROUPS
