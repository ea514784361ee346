"""Shaped rewards against their formulae in Python floats and against published examples."""

import inspect
import math
import statistics

import pytest
import torch

from fastrl.reward_shaping import REWARD_SHAPINGS, TOKEN_REWARD_SHAPINGS
from fastrl.reward_shaping.divergences import (
    chi_squared_penalised,
    constrained,
    kl_penalised,
    kl_penalised_tokens,
    preference_tokens,
    root_chi_squared_penalised,
    teacher_penalised_tokens,
    whitened_kl_penalised_tokens,
)
from fastrl.reward_shaping.lengths import (
    budgeted_cosine,
    exact_length,
    history_length,
    maximum_length,
    soft_overlong,
    truncated_to_zero,
    unfinished_penalised,
)
from fastrl.reward_shaping.outcomes import (
    cheap_mode,
    clipped,
    discounted_turns,
    ensemble_cautious,
    ensemble_mean,
    ensemble_worst,
    running_scaled,
    tool_efficiency,
    verified_or_unfinished,
    weighted_sum,
)

INDEX = torch.tensor([0, 0, 0, 2, 3, 3])  # completion 1 is empty
REQUIRED = {
    "chi_squared_penalised": {"coefficient": 0.1},
    "root_chi_squared_penalised": {"coefficient": 0.1},
    "weighted_sum": {"weights": (1.0, -0.5, 2.0)},
}


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def data(dtype=torch.float64) -> dict[str, object]:
    numbers = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=numbers, dtype=torch.float64).to(dtype)

    return {
        "rewards": torch.tensor([1.0, 0.0, -2.5, 1.0], dtype=dtype),
        "reward_parts": normal(3, 4),
        "token_rewards": normal(6),
        "lengths": torch.tensor([3, 0, 1, 2]),
        "finished": torch.tensor([True, True, False, False]),
        "max_completion_length": 8192,
        "completion_index": INDEX,
        "old_logps": normal(6),
        "ref_logps": normal(6),
        "teacher_logps": normal(6),
        "dpo_logps": normal(6),
        "baseline_rewards": normal(4),
        "constraints_met": torch.tensor([True, False, True, True]),
        "target_lengths": torch.tensor([2, 2, 2, 2]),
        "shortest_lengths": torch.tensor([0, 2, 2, 2]),
        "budgets": torch.tensor([1, 2, 3, 4]),
        "num_calls": torch.tensor([0, 1, 2, 3]),
        "fewest_calls": torch.tensor([0, 1, 0, 1]),
        "reward_scale": torch.tensor(0.5, dtype=dtype),
        "turns": torch.tensor([1, 2, 3, 3]),
        "num_turns": torch.tensor([3, 3, 3, 4]),
        "used_expensive": torch.tensor([True, False, True, False]),
        "pass_rates": torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=dtype),
    }


ALL = {**REWARD_SHAPINGS, **TOKEN_REWARD_SHAPINGS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(ALL))
def test_shaping_keeps_shape_dtype_and_inputs(name, dtype):
    inputs, before = data(dtype), data(dtype)
    parameters = inspect.signature(ALL[name]).parameters.values()
    needed = [inputs[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY]
    shaped = ALL[name](*needed, **REQUIRED.get(name, {}))
    assert shaped.shape == ((6,) if name in TOKEN_REWARD_SHAPINGS else (4,))
    assert shaped.dtype == dtype
    assert torch.isfinite(shaped).all()
    for key, value in before.items():
        assert torch.equal(torch.as_tensor(inputs[key]), torch.as_tensor(value)), key


def test_verified_or_unfinished():
    finished = torch.tensor([True, True, False, False])
    found = verified_or_unfinished(doubles(1, 0.5, 1, 0), finished)
    assert found.tolist() == [10, 0, -10, -10]


def test_running_scaled():
    scale = torch.tensor(0.5, dtype=torch.float64)
    assert running_scaled(doubles(1, -2, 100), scale).tolist() == [2, -4, 10]
    assert running_scaled(doubles(1, -2, 100), scale, bound=3.0).tolist() == [2, -3, 3]


def test_whitened_rewards_keep_their_mean():
    rewards, old, ref = doubles(0, 1, 0, 0, 2), doubles(1, 2, 0, 1, 0), doubles(0, 0, 0, 3, 0)
    plain = kl_penalised_tokens(rewards, old, ref, beta=0.1)
    found = whitened_kl_penalised_tokens(rewards, old, ref, beta=0.1)
    torch.testing.assert_close(found.mean(), plain.mean())
    torch.testing.assert_close(found.std(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(found - found.mean(), (plain - plain.mean()) / plain.std())


def test_clipped():
    assert clipped(doubles(-20, -3, 0, 11)).tolist() == [-10, -3, 0, 10]
    assert clipped(doubles(-20, -3, 0, 11), bound=5.0).tolist() == [-5, -3, 0, 5]


def log_ratios(inputs, model: str) -> list[float]:
    totals = [0.0] * 4
    for owner, logp, other in zip(
        INDEX.tolist(), inputs["old_logps"].tolist(), inputs[model].tolist(), strict=True
    ):
        totals[owner] += logp - other
    return totals


def test_kl_penalties():
    inputs = data()
    rewards, old, ref = inputs["rewards"], inputs["old_logps"], inputs["ref_logps"]
    expected = [
        r - 0.03 * d for r, d in zip(rewards.tolist(), log_ratios(inputs, "ref_logps"), strict=True)
    ]
    assert kl_penalised(rewards, old, ref, INDEX).tolist() == pytest.approx(expected)
    on_tokens = kl_penalised_tokens(inputs["token_rewards"], old, ref, beta=0.1)
    expected = [
        r - 0.1 * (a - b)
        for r, a, b in zip(
            inputs["token_rewards"].tolist(), old.tolist(), ref.tolist(), strict=True
        )
    ]
    assert on_tokens.tolist() == pytest.approx(expected)
    assert torch.equal(kl_penalised(rewards, old, old, INDEX), rewards)


def test_token_penalties_of_a_completion_sum_to_its_own_penalty():
    inputs = data()
    old, ref = inputs["old_logps"], inputs["ref_logps"]
    token_penalties = kl_penalised_tokens(torch.zeros(6, dtype=torch.float64), old, ref, beta=0.2)
    whole = kl_penalised(torch.zeros(4, dtype=torch.float64), old, ref, INDEX, beta=0.2)
    assert float(token_penalties.sum()) == pytest.approx(float(whole.sum()))


def test_the_teacher_is_followed_where_the_answer_is_wrong():
    inputs = data()
    old, teacher = inputs["old_logps"], inputs["teacher_logps"]
    shaped = teacher_penalised_tokens(
        inputs["token_rewards"], inputs["rewards"], old, teacher, INDEX, beta=0.5
    )
    difference = inputs["token_rewards"] - shaped
    assert difference[[0, 1, 2, 4, 5]].tolist() == [0.0] * 5  # completions 0 and 3 are correct
    assert float(difference[3]) == pytest.approx(0.5 * float(old[3] - teacher[3]))
    all_correct = teacher_penalised_tokens(
        inputs["token_rewards"], torch.ones(4), old, teacher, INDEX
    )
    assert torch.equal(all_correct, inputs["token_rewards"])


def test_preference_tokens_are_bounded():
    token_rewards, ref = doubles(0, 0, 0, 1), doubles(-1, -1, -1, -1)
    dpo = doubles(-0.5, -9, 3, -1)
    shaped = preference_tokens(token_rewards, dpo, ref)
    assert shaped.tolist() == pytest.approx([0.025, -0.05, 0.05, 1.0])
    assert torch.equal(preference_tokens(token_rewards, dpo, ref, beta=0.0), token_rewards)


def test_chi_squared_penalties():
    inputs = data()
    rewards, old, ref = inputs["rewards"], inputs["old_logps"], inputs["ref_logps"]
    excess = [math.exp(min(d, 5)) - 1 for d in log_ratios(inputs, "ref_logps")]
    shaped = chi_squared_penalised(rewards, old, ref, INDEX, coefficient=0.3)
    expected = [r - 0.3 * e for r, e in zip(rewards.tolist(), excess, strict=True)]
    assert shaped.tolist() == pytest.approx(expected)
    far = chi_squared_penalised(rewards, old + 100, ref, INDEX, coefficient=1.0)
    assert float(far[0]) == pytest.approx(1.0 - (math.exp(5) - 1))


def test_root_chi_squared_penalty_trims_its_mean():
    ratios = [0.5 * i for i in range(-3, 7)]
    rewards, zeros = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    excess = [math.exp(d) - 1 for d in ratios]
    index = torch.arange(10)
    for trimmed, middle in ((0.0, excess), (0.2, excess[2:8])):
        shaped = root_chi_squared_penalised(
            rewards, doubles(*ratios), zeros, index, coefficient=0.3, trimmed=trimmed
        )
        root = math.sqrt(statistics.mean(middle))
        assert shaped.tolist() == pytest.approx([-0.3 * e / root for e in excess])
    same = root_chi_squared_penalised(rewards, zeros, zeros, index, coefficient=0.3)
    assert torch.equal(same, rewards)
    below = root_chi_squared_penalised(rewards, zeros - 1, zeros, index, coefficient=0.3)
    assert torch.equal(below, rewards)


def test_constrained():
    inputs = data()
    rewards, baselines = inputs["rewards"].tolist(), inputs["baseline_rewards"].tolist()
    met, ratios = inputs["constraints_met"].tolist(), log_ratios(inputs, "ref_logps")
    expected = [
        max(0, 1 - d / 0.5) / (1 + math.exp(b - r)) if kept else 0
        for r, b, kept, d in zip(rewards, baselines, met, ratios, strict=True)
    ]
    assert any(kept and d > 0.5 for kept, d in zip(met, ratios, strict=True))
    shaped = constrained(
        inputs["rewards"],
        inputs["baseline_rewards"],
        inputs["constraints_met"],
        inputs["old_logps"],
        inputs["ref_logps"],
        INDEX,
        max_kl=0.5,
    )
    assert shaped.tolist() == pytest.approx(expected)


def test_soft_overlong_golden_values():
    lengths = torch.tensor([0, 16384, 18432, 20480, 20481])
    penalties = soft_overlong(torch.zeros(5, dtype=torch.float64), lengths, 20480)
    assert penalties.tolist() == [0, 0, -0.5, -1, -1]
    assert soft_overlong(doubles(1, 1, 1, 1, 1), lengths, 20480).tolist() == [1, 1, 0.5, 0, 0]
    with pytest.raises(ValueError, match="cache between 1 and max_completion_length"):
        soft_overlong(doubles(1.0), torch.tensor([3]), 8)


def test_unfinished_completions():
    rewards, finished = doubles(1, -2, 3), torch.tensor([True, False, False])
    assert truncated_to_zero(rewards, finished).tolist() == [1, 0, 0]
    assert unfinished_penalised(rewards, finished).tolist() == [1, -3, 2]
    assert unfinished_penalised(rewards, finished, penalty=10.0).tolist() == [1, -12, -7]
    everyone = torch.ones(3, dtype=torch.bool)
    assert torch.equal(truncated_to_zero(rewards, everyone), rewards)


def test_target_length_golden_values():
    rewards, lengths = doubles(1, 1, 0, 1, 1), torch.tensor([1500, 400, 400, 1000, 9000])
    targets = torch.full((5,), 1000)
    exact = exact_length(rewards, lengths, targets)
    assert exact.tolist() == pytest.approx([0.85, 0.82, -0.18, 1.0, -1.4])
    maximum = maximum_length(rewards, lengths, targets)
    assert maximum.tolist() == pytest.approx([0.35, 0.68, 0.0, 0.5, 0.0])


def test_history_length_golden_values():
    lengths = torch.tensor([500, 1500, 1000, 3000, 500, 1500, 700, 700])
    shortest = torch.tensor([1000] * 6 + [0, 0])
    correct = doubles(1, 1, 1, 1, 0, 0, 1, 0)
    shaped = history_length(correct, lengths, shortest)
    length_rewards = [0.707107, -0.7, 0.0, -0.7, 0.0, -0.707107, 0.0, 0.0]
    assert (shaped - correct).tolist() == pytest.approx(length_rewards, abs=1e-6)
    without = history_length(correct, lengths, shortest, weight=0.0)
    assert torch.equal(without, correct)


def test_every_correct_completion_stays_above_every_wrong_one():
    lengths = torch.arange(0, 4000, 10)
    shortest = torch.full_like(lengths, 1000)
    ones = torch.ones(len(lengths), dtype=torch.float64)
    correct = history_length(ones, lengths, shortest)
    wrong = history_length(0 * ones, lengths, shortest)
    assert correct.min() > wrong.max()


def test_budgeted_cosine_golden_values():
    lengths, budgets = torch.tensor([800, 2000, 1024, 800, 4097]), torch.full((5,), 1024)
    shaped = budgeted_cosine(doubles(1, 1, 1, 0, 1), lengths, budgets, 4096)
    assert shaped.tolist() == pytest.approx([3.695518, 2.641729, 3.695518, 0, 0], abs=1e-6)


def test_budgeted_cosine_is_the_lower_of_its_two_branches():
    lengths = torch.arange(0, 4097, 64)
    shaped = budgeted_cosine(
        torch.ones(len(lengths), dtype=torch.float64), lengths, torch.full_like(lengths, 1024), 4096
    )
    for length, value in zip(lengths.tolist(), shaped.tolist(), strict=True):
        beyond = 4 * math.cos(math.pi * length / 8192) - abs(length - 1024) / 4096
        within = 4 * math.cos(math.pi * 1024 / 8192)
        assert value == pytest.approx(beyond if length > 1024 else within)


def test_tool_efficiency_golden_values():
    calls, fewest = torch.tensor([0, 2, 1, 3, 1]), torch.tensor([0, 0, 1, 1, 2])
    shaped = tool_efficiency(doubles(1, 1, 1, 1, 1), calls, fewest)
    expected = [1, 0.707107, 1, 0.707107, 0.866025]
    assert shaped.tolist() == pytest.approx(expected, abs=1e-6)
    assert tool_efficiency(doubles(0, 0, 0, 0, 0), calls, fewest).tolist() == [0.0] * 5
    for n in range(1, 6):
        same = torch.tensor([n])
        assert float(tool_efficiency(doubles(1.0), same, same, alpha=0.5)) == pytest.approx(0.5)


def test_discounted_turns():
    turns, num_turns = torch.tensor([1, 2, 3, 1]), torch.tensor([3, 3, 3, 1])
    shaped = discounted_turns(doubles(1, 1, 1, 2), turns, num_turns, discount=0.5)
    assert shaped.tolist() == [0.25, 0.5, 1, 2]
    undiscounted = discounted_turns(doubles(1, 1, 1, 2), turns, num_turns, discount=1.0)
    assert undiscounted.tolist() == [1, 1, 1, 2]


def test_cheap_mode():
    used, rates = torch.tensor([True, False, True]), doubles(0.5, 0.5, 1.0)
    assert cheap_mode(doubles(1, 1, 0), used, rates).tolist() == [1.75, 2.0, 0.0]


def test_ensembles():
    parts = data()["reward_parts"]
    columns = parts.T.tolist()
    assert ensemble_mean(parts).tolist() == pytest.approx([statistics.mean(c) for c in columns])
    assert ensemble_worst(parts).tolist() == [min(c) for c in columns]
    expected = [statistics.mean(c) - 0.5 * statistics.variance(c) for c in columns]
    assert ensemble_cautious(parts, caution=0.5).tolist() == pytest.approx(expected)
    assert torch.equal(ensemble_cautious(parts[:1]), parts[0])


def test_weighted_sum():
    parts = doubles(1, 2, 3, 4).view(2, 2)
    assert weighted_sum(parts, weights=(2.0, -0.5)).tolist() == [0.5, 2.0]
    with pytest.raises(ValueError, match="one weight for each of 2 rewards, got 3"):
        weighted_sum(parts, weights=(1.0, 1.0, 1.0))
