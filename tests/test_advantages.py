"""Golden values of one group, identities between estimators, degenerate groups."""

import pytest
import torch

from fastrl.advantages import (
    ADVANTAGES,
    batch_centred,
    batch_relative,
    group_centred,
    group_relative,
    leave_one_out,
)

REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)


def test_golden_values_of_one_group():
    assert group_centred(REWARDS, 8)[:2].tolist() == pytest.approx([0.75, -0.25], abs=1e-6)
    assert leave_one_out(REWARDS, 8)[:2].tolist() == pytest.approx([0.857143, -0.285714], abs=1e-6)
    std = 0.462910
    expected = [0.75 / (std + 1e-4), -0.25 / (std + 1e-4)]
    assert group_relative(REWARDS, 8)[:2].tolist() == pytest.approx(expected, abs=1e-5)


def test_groups_do_not_see_each_other():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(21, generator=generator, dtype=torch.float64)
    for name in ("group_relative", "group_centred", "leave_one_out"):
        whole = ADVANTAGES[name](rewards, 7)
        alone = torch.cat([ADVANTAGES[name](group, 7) for group in rewards.split(7)])
        torch.testing.assert_close(whole, alone, rtol=1e-13, atol=1e-13)
        assert whole.view(3, 7).sum(dim=1).abs().max() < 1e-12


def test_batch_relative_with_one_prompt_is_group_relative():
    torch.testing.assert_close(batch_relative(REWARDS, 8), group_relative(REWARDS, 8))


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_equal_rewards_give_exactly_zero(name):
    rewards = torch.full((6,), 0.1, dtype=torch.float64)
    assert ADVANTAGES[name](rewards, 3).abs().max() < 1e-15


def test_group_relative_of_rounding_noise_is_zero():
    rewards = torch.full((4,), 0.3, dtype=torch.float64) + 1e-12 * torch.arange(4)
    assert torch.equal(group_relative(rewards, 4), torch.zeros(4, dtype=torch.float64))


def test_a_group_of_one_is_refused_but_a_batch_baseline_is_not():
    with pytest.raises(ValueError, match="at least 2"):
        group_relative(REWARDS, 1)
    assert batch_centred(REWARDS, 1).sum().abs() < 1e-12
