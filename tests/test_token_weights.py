"""Token weights and clip bounds against their formulae in Python floats."""

import collections
import dataclasses
import inspect
import itertools
import math

import pytest
import torch

from fastrl.config import ObjectiveConfig
from fastrl.methods import resolve_method
from fastrl.methods.coefficients import token_weights
from fastrl.token_weights import (
    TOKEN_WEIGHTS,
    advantage_entropy,
    clip_covariance,
    covariance_top,
    curvature,
    entropy_clip_bounds,
    entropy_redistribution,
    failure_rates,
    high_entropy,
    kept_lengths,
    probability_power,
    random,
    relative_entropies,
)
from tests.helpers_methods import step_inputs

NUM_TOKENS = 101
REQUIRED = {"probability_power": {"power": 0.5}}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_data(num_tokens: int, dtype=torch.float64) -> dict[str, torch.Tensor]:
    numbers = generator(num_tokens)

    def normal():
        return torch.randn(num_tokens, generator=numbers, dtype=torch.float64).to(dtype)

    p = torch.rand(num_tokens, generator=numbers, dtype=torch.float64).to(dtype)
    return {
        "entropies": normal().abs(),
        "advantages": normal(),
        "logps": p.log(),
        "old_logps": p.log() + 0.1 * normal(),
        "clipped": normal() > 1,
        "sum_p2": p.square(),
        "sum_p3": p**3,
        "squared_hidden_norms": 1000 * normal().square(),
        "generator": generator(),
        "rewards": torch.tensor([1, 0, 0, 1], dtype=dtype),
        "groups": torch.tensor([0, 0, 0, 1]),
        "completion_index": torch.arange(num_tokens) * 4 // max(num_tokens, 1),
    }


def weights_of(name, data, **hyper_parameters):
    parameters = inspect.signature(TOKEN_WEIGHTS[name]).parameters.values()
    needed = [data[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return TOKEN_WEIGHTS[name](*needed, **REQUIRED.get(name, {}), **hyper_parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(TOKEN_WEIGHTS))
def test_weights_keep_the_dtype_and_the_inputs(name, dtype):
    data = random_data(NUM_TOKENS, dtype)
    before = {key: value.clone() for key, value in data.items() if torch.is_tensor(value)}
    weights = weights_of(name, data)
    assert weights.shape == (NUM_TOKENS,)
    assert weights.dtype == dtype
    largest = 101 / 50 if name == "random" else 2
    assert ((weights >= 0) & (weights <= largest)).all()
    assert all(torch.equal(data[key], value) for key, value in before.items())


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("name", sorted(TOKEN_WEIGHTS))
def test_no_token_and_one_token(name, num_tokens):
    weights = weights_of(name, random_data(num_tokens))
    assert weights.shape == (num_tokens,)
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 2, 6, 11, 101])
def test_high_entropy_is_at_or_above_the_interpolated_quantile(fraction, num_tokens):
    entropies = torch.rand(num_tokens, generator=generator(), dtype=torch.float64)
    threshold = torch.quantile(entropies, 1 - fraction) - 1e-12
    expected = (entropies >= threshold).double()
    assert torch.equal(high_entropy(entropies, fraction=fraction), expected)


def test_equal_entropies_keep_the_first_tokens():
    assert high_entropy(torch.zeros(6), fraction=0.2).tolist() == [1, 1, 0, 0, 0, 0]
    assert high_entropy(torch.rand(9, generator=generator()), fraction=1.0).sum() == 9


def test_advantage_entropy_keeps_the_largest_products():
    data = random_data(NUM_TOKENS)
    scores = [
        abs(a) * h
        for a, h in zip(data["advantages"].tolist(), data["entropies"].tolist(), strict=True)
    ]
    order = sorted(range(NUM_TOKENS), key=lambda t: -scores[t])
    kept = advantage_entropy(data["advantages"], data["entropies"]).nonzero().flatten()
    assert kept.tolist() == sorted(order[:20])  # a fifth of 101
    assert advantage_entropy(data["advantages"], data["entropies"], fraction=1.0).all()
    ties = advantage_entropy(torch.zeros(10), torch.ones(10), fraction=0.3)
    assert ties.tolist() == [1.0] * 3 + [0.0] * 7


def test_random_tokens_stand_for_all():
    """Every pair of five tokens is as likely, and over the pairs the mean weight is exactly 1."""
    numbers, num_draws = generator(), 4000
    advantages = torch.zeros(5, dtype=torch.float64)
    counts = collections.Counter(
        tuple(random(advantages, numbers, fraction=0.4).tolist()) for _ in range(num_draws)
    )
    pairs = {
        tuple(2.5 if token in pair else 0.0 for token in range(5))
        for pair in itertools.combinations(range(5), 2)
    }
    assert counts.keys() == pairs
    assert [sum(column) / len(pairs) for column in zip(*pairs, strict=True)] == [1.0] * 5
    deviation = math.sqrt(num_draws * 0.1 * 0.9)
    assert max(abs(count - num_draws / 10) for count in counts.values()) < 5 * deviation


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_weights_of_random_tokens_are_those_of_all_on_average(aggregation):
    """Exactly, over all pairs of five tokens: dropped ones stay in the denominators."""
    inputs = dataclasses.replace(step_inputs([2], [2, 3]), advantages=torch.ones(5).double())
    choices = {"aggregation": aggregation, "parameters": {"fraction": 0.4}}
    sampled = resolve_method("grpo", ObjectiveConfig(token_weights="random", **choices))
    found = {tuple(token_weights(sampled, inputs).tolist()) for _ in range(200)}
    assert len(found) == 10
    mean = torch.tensor(list(found), dtype=torch.float64).mean(0)
    expected = token_weights(dataclasses.replace(sampled, token_weights=None), inputs)
    torch.testing.assert_close(mean, expected, rtol=1e-14, atol=0)


def test_random_draws_whole_tokens_and_weighs_by_their_true_share():
    for num_tokens, fraction, num_drawn in ((7, 0.3, 2), (10, 0.7, 7), (3, 0.01, 1), (9, 1.0, 9)):
        weights = random(torch.ones(num_tokens), generator(), fraction=fraction)
        assert int((weights != 0).sum()) == num_drawn
        assert torch.equal(weights[weights != 0], torch.full((num_drawn,), num_tokens / num_drawn))


def covariances(data):
    advantages, logps = data["advantages"].tolist(), data["logps"].tolist()
    mean_advantage, mean_logp = sum(advantages) / len(advantages), sum(logps) / len(logps)
    return [
        (a - mean_advantage) * (logp - mean_logp) for a, logp in zip(advantages, logps, strict=True)
    ]


def test_clip_covariance_draws_among_the_candidates():
    data = random_data(NUM_TOKENS)
    candidates = {
        t
        for t, value in enumerate(covariances(data))
        if 0.3 < value < 2.0 and not data["clipped"][t]
    }
    assert len(candidates) > 6
    drawn = set()
    numbers = generator()
    for _ in range(200):
        data["generator"] = numbers
        weights = weights_of("clip_covariance", data, fraction=0.05, lowest=0.3, highest=2.0)
        dropped = (weights == 0).nonzero().flatten().tolist()
        assert len(dropped) == 5
        assert int(weights.sum()) == NUM_TOKENS - 5
        drawn |= set(dropped)
    assert drawn == candidates


def test_clip_covariance_drops_at_least_one_and_never_more_than_the_candidates():
    logps, advantages = torch.tensor([0.0, -2.0, -2.0]), torch.tensor([4.0, 1.0, 1.0])
    free = torch.zeros(3, dtype=torch.bool)  # covariances 2.67, 0.67 and 0.67
    assert clip_covariance(logps, advantages, free, generator()).tolist() == [0, 1, 1]
    assert clip_covariance(logps, advantages, ~free, generator()).tolist() == [1, 1, 1]
    dropped = clip_covariance(logps, advantages, free, generator(), fraction=1.0)
    assert dropped.tolist() == [0, 1, 1]


def test_covariance_top_marks_the_highest():
    data = random_data(NUM_TOKENS)
    values = covariances(data)
    order = sorted(range(NUM_TOKENS), key=lambda t: -values[t])
    for fraction, num_marked in ((0.1, 10), (2e-3, 1)):
        marked = covariance_top(data["logps"], data["advantages"], fraction=fraction)
        assert marked.nonzero().flatten().tolist() == sorted(order[:num_marked])
    assert covariance_top(torch.zeros(3), torch.zeros(3)).tolist() == [1, 0, 0]


def test_curvature_is_the_second_order_shift_of_a_step_on_one_token():
    """The shifts from whole distributions: v = onehot - p, update = rate * A * |h|^2 * v."""
    numbers = generator()
    p = torch.softmax(2 * torch.randn(40, 7, generator=numbers, dtype=torch.float64), dim=1)
    tokens = torch.randint(0, 7, (40,), generator=numbers)
    advantages = torch.randn(40, generator=numbers, dtype=torch.float64)
    norms = 2000 * torch.rand(40, generator=numbers, dtype=torch.float64)
    expected = []
    for row in range(40):
        score = torch.nn.functional.one_hot(tokens[row], 7) - p[row]
        update = 1.5e-5 * advantages[row] * norms[row] * score
        moved = float(score @ update)
        variance = float(p[row] @ update.square() - (p[row] @ update).square())
        a = float(advantages[row])
        objective_shift = a * float(score @ update) + a * (moved**2 - variance) / 2
        expected.append(float(moved**2 / 2 <= 1e-4 and abs(objective_shift) <= 0.01))
    logps = p[torch.arange(40), tokens].log()
    weights = curvature(logps, advantages, p.square().sum(1), (p**3).sum(1), norms)
    assert weights.tolist() == expected
    assert 0 < sum(expected) < 40


@pytest.mark.parametrize("limit", ["max_policy_shift", "max_objective_shift"])
def test_curvature_limits_both_shifts(limit):
    """p = 1/2 of two tokens: |v|^2 = 1/2, variance of p over v = 1/4."""
    half = torch.tensor([0.5], dtype=torch.float64)
    step = 1e-3 * 2.0 * 100.0
    policy_shift = (step / 2) ** 2 / 2
    objective_shift = step * 2.0 / 2 + 2.0 * step**2 / 2 * (1 / 4 - 1 / 4)
    exact = {"max_policy_shift": policy_shift, "max_objective_shift": objective_shift}
    for factor, kept in ((1.001, 1.0), (0.999, 0.0)):
        limits = {name: value * 1.001 for name, value in exact.items()}
        limits[limit] = exact[limit] * factor
        weights = curvature(
            half.log(), 4 * half, half, half / 2, 200 * half, learning_rate=1e-3, **limits
        )
        assert weights.tolist() == [kept]


def test_curvature_limits_the_fall_of_the_objective_too():
    """p = 0.1 of two tokens, advantage -1, step 2: 1.62 * 2 - 4 * (1.62^2 - 0.2916) / 2 < -1.4."""
    p, one = torch.tensor([0.1], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for limit, kept in ((1.5, 1.0), (1.4, 0.0)):
        weights = curvature(
            p.log(),
            -one,
            0.82 * one,
            0.73 * one,
            2 * one,
            learning_rate=1.0,
            max_policy_shift=math.inf,
            max_objective_shift=limit,
        )
        assert weights.tolist() == [kept]


def test_probability_power():
    logps = torch.tensor([-3.0, -0.5, 0.0, -math.inf], dtype=torch.float64)
    expected = [math.exp(-1.5), math.exp(-0.25), 1.0, 0.0]
    assert probability_power(logps, power=0.5).tolist() == pytest.approx(expected)


def hapo_reference(entropies):
    """The published feature: log entropies around their quantile, divided by their spread."""
    logs = [math.log(max(h, 1e-8)) for h in entropies]
    middle = sorted(logs)[round(0.8 * (len(logs) - 1))]
    spread = math.sqrt(sum((e - middle) ** 2 for e in logs) / len(logs))
    scores = [(e - middle) / spread for e in logs]
    highest, lowest = max(scores), min(scores)
    return [h / highest if h > 0 else h / abs(lowest) for h in scores]


def test_relative_entropies_and_the_bounds_that_follow_them():
    entropies = torch.rand(NUM_TOKENS, generator=generator(), dtype=torch.float64)
    entropies[7] = 0.0
    expected = hapo_reference(entropies.tolist())
    assert relative_entropies(entropies).tolist() == pytest.approx(expected)
    assert (min(expected), max(expected)) == (-1.0, 1.0)
    bounds = entropy_clip_bounds(entropies, epsilon_low=0.2, epsilon_high=0.28)
    low = [0.2 * (1 - h) if h <= 0 else 0.2 for h in expected]
    high = [0.28 * (1 + h) if h > 0 else 0.28 for h in expected]
    assert bounds.epsilon_low.tolist() == pytest.approx(low)
    assert bounds.epsilon_high.tolist() == pytest.approx(high)


def test_equal_entropies_leave_bounds_and_weights_alone():
    entropies = torch.full((5,), 0.7, dtype=torch.float64)
    assert relative_entropies(entropies).tolist() == [0.0] * 5
    bounds = entropy_clip_bounds(entropies)
    assert bounds.epsilon_low.tolist() == bounds.epsilon_high.tolist() == [0.2] * 5
    logps = torch.linspace(-3, 0, 5, dtype=torch.float64)
    assert entropy_redistribution(entropies, logps, logps.flip(0)).tolist() == [1.0] * 5


def test_redistribution_damps_certain_tokens_at_rest_and_raises_uncertain_ones_that_move():
    numbers = generator(1)
    entropies = torch.rand(NUM_TOKENS, generator=numbers, dtype=torch.float64)
    differences = 0.3 * torch.randn(NUM_TOKENS, generator=numbers, dtype=torch.float64)
    old_logps = torch.full((NUM_TOKENS,), -1.0, dtype=torch.float64)
    expected = []
    for h, d in zip(hapo_reference(entropies.tolist()), differences.tolist(), strict=True):
        low = 0.2 * (1 - h) if h <= 0 else 0.2
        high = 0.2 * (1 + h) if h > 0 else 0.2
        inside = 1 - low / 2 < math.exp(d) < 1 + high / 2
        changes = (h > 0 and not inside) or (h <= 0 and inside)
        expected.append(1 + h if changes else 1.0)
    weights = entropy_redistribution(entropies, old_logps + differences, old_logps)
    assert weights.tolist() == pytest.approx(expected)
    on_policy = entropy_redistribution(entropies, old_logps, old_logps)
    assert on_policy.tolist() == pytest.approx(
        [1 + min(h, 0.0) for h in hapo_reference(entropies.tolist())]
    )


def test_kept_lengths_count_weights_that_are_not_zero():
    weights, index = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0]), torch.tensor([0, 0, 2, 2, 2])
    lengths = torch.tensor([2, 0, 3])
    assert kept_lengths(weights, index, lengths).tolist() == [1, 0, 2]
    assert kept_lengths(weights, index, lengths).dtype == torch.int64


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_fraction_is_a_share_of_the_tokens(fraction):
    with pytest.raises(ValueError, match="fraction of the tokens"):
        high_entropy(torch.ones(3), fraction=fraction)


def test_failure_rates_count_hard_prompts_more():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    completion_index = torch.tensor([0, 0, 1, 4, 6, 6])
    weights = failure_rates(rewards, groups, completion_index)
    expected = torch.tensor([0.75, 0.75, 0.75, 0.02, 0.02, 0.02], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-15)
    strict = failure_rates(rewards, groups, completion_index, pass_threshold=1.0)
    assert strict[3:].tolist() == pytest.approx([1 / 3] * 3)
