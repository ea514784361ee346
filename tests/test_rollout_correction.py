"""Corrections of the sampler's mismatch against loops over completions in Python floats."""

import inspect
import math

import pytest
import torch

from fastrl.rollout_correction import (
    CORRECTIONS,
    decoupled,
    effective_sample_size,
    masked_sequences,
    masked_tokens,
    normalised_by_sequence,
    normalised_by_token,
    sequence_masked_tokens,
    truncated_sequences,
    truncated_tokens,
)

INDEX = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3])  # completion 1 is empty
LENGTHS = torch.tensor([3, 0, 1, 4])
LIMITS = {name: {"highest": 0.4} for name in CORRECTIONS if name.endswith(("k2", "k3"))}


def log_ratios(scale: float = 0.6) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(3)
    return scale * torch.randn(8, generator=numbers, dtype=torch.float64)


def logps(ratios: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(old_logps, rollout_logps) with these log ratios."""
    rollout = torch.linspace(-4, -0.25, 8, dtype=ratios.dtype)
    return rollout + ratios, rollout


def apply(name, old_logps, rollout_logps, index=INDEX, **hyper_parameters):
    rule = CORRECTIONS[name]
    data = {"old_logps": old_logps, "rollout_logps": rollout_logps, "completion_index": index}
    parameters = inspect.signature(rule).parameters.values()
    needed = [data[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return rule(*needed, **{**LIMITS.get(name, {}), **hyper_parameters})


def of_completions(values, reduce):
    """reduce() over the tokens of each completion, for every token."""
    members: dict[int, list[float]] = {}
    for value, owner in zip(values, INDEX.tolist(), strict=True):
        members.setdefault(owner, []).append(value)
    return [reduce(members[i]) for i in INDEX.tolist()]


def mean(values):
    return sum(values) / len(values)


def test_token_weights():
    ratios = log_ratios()
    kappas = [math.exp(d) for d in ratios.tolist()]
    old, rollout = logps(ratios)
    assert truncated_tokens(old, rollout, cap=1.2, floor=0.8).tolist() == pytest.approx(
        [min(max(k, 0.8), 1.2) for k in kappas]
    )
    assert decoupled(old, rollout, cap=1.1).tolist() == pytest.approx([min(k, 1.1) for k in kappas])
    kept = masked_tokens(old, rollout, lowest=0.9, highest=1.3).tolist()
    assert kept == pytest.approx([k if 0.9 <= k <= 1.3 else 0 for k in kappas])
    assert 0 < kept.count(0) < 8


def test_sequence_weights():
    ratios = log_ratios()
    products = [math.exp(d) for d in of_completions(ratios.tolist(), sum)]
    means = [math.exp(d) for d in of_completions(ratios.tolist(), mean)]
    old, rollout = logps(ratios)
    assert truncated_sequences(old, rollout, INDEX, cap=1.1).tolist() == pytest.approx(
        [min(product, 1.1) for product in products]
    )
    kept = masked_sequences(old, rollout, INDEX, lowest=0.9, highest=1.6).tolist()
    assert kept == pytest.approx([p if 0.9 <= p <= 1.6 else 0 for p in products])
    assert 0 < kept.count(0) < 8
    kept = sequence_masked_tokens(old, rollout, INDEX, lowest=0.9, highest=1.1).tolist()
    assert kept == pytest.approx(
        [math.exp(d) if 0.9 <= m <= 1.1 else 0 for d, m in zip(ratios.tolist(), means, strict=True)]
    )
    assert 0 < kept.count(0) < 8


ESTIMATES = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(d) - 1 - d,
}
REDUCTIONS = {"sum": sum, "mean": mean, "max": max}


@pytest.mark.parametrize("name", [name for name in CORRECTIONS if name.startswith("rejected")])
def test_rejections(name):
    _, level, kind = name.split("_")
    ratios = log_ratios()
    statistics = [ESTIMATES[kind](d) for d in ratios.tolist()]
    if level != "token":
        statistics = of_completions(statistics, REDUCTIONS[level])
    old, rollout = logps(ratios)
    values = sorted(set(statistics))
    middle = values[len(values) // 2]
    if kind == "k1":  # bounds are ratios
        bounds = {"lowest": math.exp(middle - 0.3), "highest": math.exp(middle + 1e-9)}
        expected = [float(middle - 0.3 <= s <= middle + 1e-9) for s in statistics]
    else:
        bounds = {"highest": middle + 1e-9}
        expected = [float(s <= middle + 1e-9) for s in statistics]
    assert apply(name, old, rollout, **bounds).tolist() == expected
    assert 0 < sum(expected) < 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_no_mismatch_changes_nothing(name, dtype):
    old, rollout = logps(torch.zeros(8, dtype=dtype))
    weights = apply(name, old, rollout)
    assert weights.dtype == dtype
    assert weights.tolist() == [1.0] * 8


def test_decoupled_without_a_cap_completes_the_ratio_to_the_sampler():
    ratios = log_ratios()
    old, rollout = logps(ratios)
    current = old + log_ratios(0.1)
    product = (current - old).exp() * decoupled(old, rollout, cap=math.inf)
    torch.testing.assert_close(product, (current - rollout).exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_an_infinite_rollout_logp_gives_finite_weights(name, infinity):
    old, rollout = logps(log_ratios())
    rollout[0], rollout[1], rollout[4] = infinity, -infinity, infinity
    weights = apply(name, old, rollout)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()


def test_log_ratios_are_clamped_as_terms_and_as_sums():
    old, rollout = logps(torch.full((8,), 15.0, dtype=torch.float64))
    rollout[3] = -math.inf
    weights = truncated_sequences(old, rollout, INDEX, cap=math.inf)
    assert weights.tolist() == pytest.approx([math.exp(20)] * 8)
    kappas = truncated_tokens(old, rollout, cap=math.inf)
    assert kappas[3:5].tolist() == pytest.approx([math.exp(20), math.exp(15)])
    old, rollout = logps(torch.full((8,), -15.0, dtype=torch.float64))
    weights = truncated_sequences(old, rollout, INDEX)
    assert weights.tolist() == pytest.approx(
        [math.exp(-20)] * 3 + [math.exp(-15)] + [math.exp(-20)] * 4
    )


def test_nan_is_not_hidden():
    old, rollout = logps(log_ratios())
    rollout[4] = math.nan
    assert truncated_tokens(old, rollout).isnan().tolist() == [False] * 4 + [True] + [False] * 3
    assert truncated_sequences(old, rollout, INDEX).isnan().tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_no_tokens(name):
    nothing = torch.zeros(0)
    assert apply(name, nothing, nothing, index=INDEX[:0]).shape == (0,)


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_one_completion_of_one_token_is_the_same_at_every_level(name):
    old, rollout = torch.tensor([-1.0]), torch.tensor([-1.3])
    weights = apply(name, old, rollout, index=torch.tensor([0]))
    assert weights.tolist() == pytest.approx([1.0 if "rejected" in name else math.exp(0.3)])


def test_normalised_weights_have_mean_one():
    weights = torch.tensor([2.0, 0, 1, 3, 1, 1, 0, 4], dtype=torch.float64)
    torch.testing.assert_close(normalised_by_token(weights), weights / 1.5)
    mean_of_means = (1.0 + 3.0 + 1.5) / 3
    normalised = normalised_by_sequence(weights, INDEX, LENGTHS)
    torch.testing.assert_close(normalised, weights / mean_of_means)
    nothing = torch.zeros(8)
    assert normalised_by_token(nothing).tolist() == [0.0] * 8
    assert normalised_by_sequence(nothing, INDEX, LENGTHS).tolist() == [0.0] * 8


def test_effective_sample_size():
    assert float(effective_sample_size(torch.full((5,), 0.3))) == pytest.approx(5)
    assert float(effective_sample_size(torch.tensor([0.0, 7.0, 0.0]))) == pytest.approx(1)
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert float(effective_sample_size(weights)) == pytest.approx(36 / 14)
    assert float(effective_sample_size(torch.zeros(4))) == 0
    assert float(effective_sample_size(torch.zeros(0))) == 0


def test_bounds_are_checked():
    old, rollout = logps(log_ratios())
    with pytest.raises(ValueError, match="bounds of a ratio"):
        masked_tokens(old, rollout, lowest=2.0, highest=0.5)
    with pytest.raises(ValueError, match="both are ratios"):
        apply("rejected_token_k1", old, rollout, lowest=-0.5, highest=0.5)
    with pytest.raises(ValueError, match="divergence limit"):
        apply("rejected_sum_k3", old, rollout, highest=-1.0)
