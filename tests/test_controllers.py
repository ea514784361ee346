"""Controllers against their update rules, step by step and through a checkpoint."""

import math
import statistics

import pytest
import torch

from fastrl.controllers import AdaptiveKL, DoublingKL, RunningRewards, TargetEntropy


def test_adaptive_kl_moves_at_most_a_fifth_a_horizon():
    controller = AdaptiveKL(0.2)
    assert controller.update(6.0, 256) == 0.2
    expected = 0.2 * (1 + 0.1 * 256 / 10_000)
    assert controller.update(6.6, 256) == pytest.approx(expected)
    expected *= 1 + 0.2 * 256 / 10_000
    assert controller.update(60.0, 256) == pytest.approx(expected)
    expected *= 1 - 0.2 * 512 / 10_000
    assert controller.update(0.0, 512) == pytest.approx(expected)


def test_adaptive_kl_settles_where_the_kl_meets_the_target():
    """A policy whose KL is 3 / beta meets a target of 6 at beta 0.5."""
    controller = AdaptiveKL(0.1, horizon=100.0)
    for _ in range(200):
        controller.update(3 / controller.beta, 50)
    assert controller.beta == pytest.approx(0.5, rel=1e-6)


def test_doubling_kl():
    controller = DoublingKL(1.0)
    steps = [(0.0151, 2.0), (0.015, 2.0), (0.0067, 2.0), (0.0066, 1.0), (0.0, 0.5)]
    for kl, beta in steps:
        assert controller.update(kl) == beta


def test_target_entropy_steps_towards_the_target_and_stays_in_bounds():
    controller = TargetEntropy(0.0, target_entropy=0.2, step_size=0.005, lowest=0.0, highest=0.012)
    coefficients = [controller.update(entropy) for entropy in (0.1, 0.1, 0.1, 0.2, 0.3, 0.3, 0.3)]
    assert coefficients == pytest.approx([0.005, 0.01, 0.012, 0.012, 0.007, 0.002, 0.0])


def test_running_rewards_are_those_of_all_rewards_at_once():
    numbers = torch.Generator().manual_seed(0)
    running, seen = RunningRewards(), []
    for size in (1, 7, 0, 16):
        rewards = 1e3 + 5 * torch.randn(size, generator=numbers, dtype=torch.float64)
        running.update(rewards)
        seen += rewards.tolist()
    mean, std = statistics.mean(seen), statistics.stdev(seen)
    assert float(running.mean) == pytest.approx(mean, rel=1e-12)
    assert float(running.std) == pytest.approx(std, rel=1e-10)
    rewards = torch.tensor(seen, dtype=torch.float64)
    scaled = running.scaled(rewards, bound=math.inf)
    assert scaled.tolist() == pytest.approx([r / std for r in seen])
    assert running.scaled(rewards).tolist() == [10.0] * len(seen)
    expected = [min(max((r - mean) / std, -1.0), 1.0) for r in seen]
    standardised = running.standardised(rewards, bound=1.0)
    assert standardised.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rewards", [[2.0], [0.1] * 5, []])
def test_rewards_without_spread_keep_their_unit(rewards):
    running = RunningRewards()
    running.update(torch.tensor(rewards))
    values = torch.tensor([3.0, -30.0])
    assert running.scaled(values).tolist() == [3.0, -10.0]
    assert running.scaled(values).dtype == torch.float32
    assert torch.isfinite(running.standardised(values)).all()


def test_rewards_that_are_not_finite_are_refused():
    running = RunningRewards()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite rewards"):
            running.update(torch.tensor([1.0, bad]))
    assert float(running.count) == 0


def test_state_survives_a_checkpoint():
    kl, doubling = AdaptiveKL(0.2), DoublingKL(0.2)
    entropy = TargetEntropy(0.1, target_entropy=1.0, step_size=0.1, lowest=0.0, highest=1.0)
    rewards = RunningRewards()
    kl.update(9.0, 100)
    doubling.update(9.0)
    entropy.update(0.5)
    rewards.update(torch.tensor([1.0, 2.0, 4.0]))
    others = (
        AdaptiveKL(1.0),
        DoublingKL(1.0),
        TargetEntropy(0.0, target_entropy=1.0, step_size=0.1, lowest=0.0, highest=1.0),
        RunningRewards(),
    )
    for controller, other in zip((kl, doubling, entropy, rewards), others, strict=True):
        other.load_state_dict(controller.state_dict())
        assert other.state_dict() == controller.state_dict()
    assert others[0].update(9.0, 100) == kl.update(9.0, 100)
    assert others[1].update(9.0) == doubling.update(9.0)
    assert others[2].update(0.5) == entropy.update(0.5) == pytest.approx(0.3)
    more = torch.tensor([7.0])
    others[3].update(more)
    rewards.update(more)
    assert (
        float(others[3].std) == float(rewards.std) == pytest.approx(statistics.stdev([1, 2, 4, 7]))
    )


def test_bad_settings_and_measurements_are_refused():
    with pytest.raises(ValueError, match="beta of 0 would stay 0"):
        AdaptiveKL(0.0)
    with pytest.raises(ValueError, match="beta of 0 would stay 0"):
        DoublingKL(0.0)
    with pytest.raises(ValueError, match="coefficient in"):
        TargetEntropy(2.0, target_entropy=1.0, step_size=0.1, lowest=0.0, highest=1.0)
    entropy = TargetEntropy(0.1, target_entropy=1.0, step_size=0.1, lowest=0.0, highest=1.0)
    for update in (lambda v: AdaptiveKL(1.0).update(v, 1), DoublingKL(1.0).update, entropy.update):
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match="finite"):
                update(value)
