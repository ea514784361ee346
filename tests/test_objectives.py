"""Surrogates: value == formula, slope == derivative, one-sided on kinks, safe at extremes."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastrl_kernels.objectives import (
    SURROGATES,
    Objective,
    Regulariser,
    bind_torch,
    clipped_ratio,
    evaluate,
    k3,
    k3_is,
)
from tests.objective_formulas import HYPER, SURROGATE_FORMULAS, close, make_tokens, run

NAMES = sorted(SURROGATES)
WITH_HYPER = sorted(set(NAMES) & set(HYPER))
PENALISED = {"kl_penalised_ratio", "mirror_descent"}  # have a slope without an advantage
INFINITY = math.inf


def one(*numbers: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([number], dtype=torch.float64) for number in numbers)


@pytest.mark.parametrize("name", NAMES)
def test_value_is_the_formula(name: str) -> None:
    logps, old_logps, _, advantages = make_tokens()
    value, _ = run(name, logps, old_logps, advantages)
    columns = (logps.tolist(), old_logps.tolist(), advantages.tolist())
    formula, hyper = SURROGATE_FORMULAS[name], HYPER.get(name, ())
    expected = [formula(*token, *hyper) for token in zip(*columns, strict=True)]
    close(value, torch.tensor(expected, dtype=torch.float64))


DIFFERENTIATED = ("soft_gated_ratio", "truncated_importance", "tapered", "negative_aware")


def differentiable(name: str, logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
    """The formula, its constants detached: of these the code hides the slope from autograd."""
    ratio = torch.exp((logp - old_logp).clamp(-20, 20))
    if name == "soft_gated_ratio":
        temperature = torch.where(advantage > 0, torch.ones_like(logp), 1.05)
        return 4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantage
    if name == "truncated_importance":
        return ratio.clamp(0, 5).detach() * advantage * logp
    if name == "tapered":
        return ratio.clamp(max=1).detach() * advantage * logp
    assert name == "negative_aware"
    log_ratio = logp - old_logp
    log_ratio = log_ratio + (log_ratio.clamp(-20, 10) - log_ratio).detach()
    negative = (1 - 0.4 * log_ratio.exp()) / 0.6
    negative = negative + (negative.clamp(min=1) - negative).detach()
    return torch.where(advantage > 0, log_ratio, negative.log()) * (advantage != 0)


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_derivative(name: str) -> None:
    logps, old_logps, _, advantages = make_tokens()
    tokens = (logps.requires_grad_(), old_logps, advantages)
    value, slope = run(name, *tokens)
    if name in DIFFERENTIATED:
        value = differentiable(name, *tokens)
    (gradient,) = torch.autograd.grad(value.sum(), logps)
    close(slope.detach(), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtype_is_kept_and_float32_is_accurate(name: str, dtype: torch.dtype) -> None:
    logps, old_logps, _, advantages = (x.to(dtype) for x in make_tokens())
    result = run(name, logps, old_logps, advantages)
    truth = run(name, logps.double(), old_logps.double(), advantages.double())
    for got, expected in zip(result, truth, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (1,), (257,)])
@pytest.mark.parametrize("name", WITH_HYPER)
def test_parameters_may_be_tensors(name: str, shape: tuple[int, ...]) -> None:
    logps, old_logps, _, advantages = make_tokens()
    tensors = tuple(torch.full(shape, x, dtype=torch.float64) for x in HYPER[name])
    result = run(name, logps, old_logps, advantages, hyper=tensors)
    for got, expected in zip(result, run(name, logps, old_logps, advantages), strict=True):
        close(got, expected, 1e-15)


@pytest.mark.parametrize("name", WITH_HYPER)
def test_each_token_has_its_own_parameters(name: str) -> None:
    logps, old_logps, _, advantages = make_tokens()
    first = torch.arange(257) % 2 == 0
    others = tuple(1.1 * x for x in HYPER[name])
    mixed = tuple(
        torch.where(first, torch.tensor(x, dtype=torch.float64), y)
        for x, y in zip(HYPER[name], others, strict=True)
    )
    result = run(name, logps, old_logps, advantages, hyper=mixed)
    halves = [run(name, logps, old_logps, advantages, hyper=x) for x in (HYPER[name], others)]
    for got, one_half, other_half in zip(result, *halves, strict=True):
        close(got, torch.where(first, one_half, other_half), 1e-15)


@pytest.mark.parametrize("advantage", [-1.5, 1.5])
@pytest.mark.parametrize("log_ratio", [-0.3, 0.3])
@pytest.mark.parametrize(
    "name", ["bounded_ratio", "masked_ratio", "one_sided_masked_ratio", "probability_masked_ratio"]
)
def test_a_tie_has_the_unclipped_slope(name: str, log_ratio: float, advantage: float) -> None:
    """With the bounds at the token; with bounds one rounding narrower, the side that is stopped."""
    tokens = one(-1.0, -1.0 - log_ratio, advantage)
    place = float((tokens[0] - tokens[1]).exp())
    far: tuple[float, ...] = (0.01, 100.0)
    stops = advantage * log_ratio > 0 or name == "masked_ratio"
    if name == "probability_masked_ratio":
        place = abs(float(tokens[0].exp() - tokens[1].exp()))
        far = (100.0, 100.0)
    upper = log_ratio > 0
    narrower = math.nextafter(place, 0.0 if upper or far[0] > 1 else INFINITY)
    extra = (200.0,) if name == "bounded_ratio" else ()
    for bound, expected in ((place, False), (narrower, stops)):
        hyper = (far[0], bound) if upper else (bound, far[1])
        _, slope = run(name, *tokens, hyper=(*hyper, *extra))
        assert (slope == 0) == expected
        if not expected:
            assert torch.equal(slope, (tokens[0] - tokens[1]).exp() * advantage)


def test_ties_of_the_dual_clip_and_of_the_clamp() -> None:
    tokens = one(-1.0, -2.0, -1.5)
    place = float((tokens[0] - tokens[1]).exp())
    for name in ("dual_clipped_ratio", "two_sided_clipped_ratio"):
        assert run(name, *tokens, hyper=(0.2, 0.28, place))[1] == -1.5 * place
        assert run(name, *tokens, hyper=(0.2, 0.28, math.nextafter(place, 0.0)))[1] == 0
    for log_ratio, factor in ((20.0, 1.0), (20.000001, 0.0), (-20.0, 1.0), (-20.000001, 0.0)):
        (logp, old_logp, advantage) = one(0.0, -log_ratio, 2.0)
        value, slope = run("importance_ratio", logp, old_logp, advantage)
        close(slope, factor * value)


EXTREMES = list(itertools.product((0.0, -1e-6, -50.0, -1e4), repeat=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_tokens_give_finite_numbers(name: str, dtype: torch.dtype) -> None:
    rows = [(x, y, a) for x, y in EXTREMES for a in (0.0, 1.0, -1.0, 1e4, -1e4)]
    logps, old_logps, advantages = torch.tensor(rows, dtype=dtype).T
    for hyper in (HYPER.get(name, ()), tuple(torch.tensor(x) for x in HYPER.get(name, ()))):
        value, slope = run(name, logps, old_logps, advantages, hyper=hyper)
        assert value.isfinite().all()
        assert slope.isfinite().all()
        constant_past_the_clamp = name not in (
            "policy_gradient", "log_likelihood", "truncated_importance", "tapered",
            "shaped_probability", "negative_aware", "linear_bound",
        )  # fmt: skip
        if constant_past_the_clamp:
            assert not slope[(logps - old_logps).abs() > 20].any()


@pytest.mark.parametrize("name", sorted(set(NAMES) - PENALISED - {"log_likelihood"}))
def test_no_advantage_no_slope(name: str) -> None:
    logps, old_logps, _, advantages = make_tokens()
    for result in run(name, logps, old_logps, 0 * advantages):
        assert not result.any()


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden(name: str) -> None:
    good, nan = torch.linspace(-3, -0.1, 7), torch.full((7,), torch.nan)
    for advantage in (1.0, -1.0):
        value, _ = run(name, nan, good, advantage + 0 * good)
        assert value.isnan().all()
    if name != "log_likelihood":
        value, slope = run(name, good, good, nan)
        assert value.isnan().all()
        assert slope.isnan().all()


@pytest.mark.parametrize("infinite", [torch.inf, -torch.inf])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"linear_bound"}))
def test_an_infinite_old_logp_gives_finite_numbers(name: str, infinite: float) -> None:
    """As a broken sampler could record one; a bound that is linear in it has no finite value."""
    infinite = -torch.inf if name.endswith(("probability_ratio", "masked_ratio")) else infinite
    logps, _, _, advantages = make_tokens()
    for result in run(name, logps, torch.full_like(logps, infinite), advantages):
        assert result.isfinite().all()


def test_no_tokens_and_one_token() -> None:
    for name in NAMES:
        logps, old_logps, _, advantages = make_tokens()
        whole = run(name, logps, old_logps, advantages)
        alone = run(name, logps[9:10], old_logps[9:10], advantages[9:10])
        for some, all_tokens in zip(alone, whole, strict=True):
            close(some, all_tokens[9:10], 1e-14)
        for nothing in run(name, logps[:0], old_logps[:0], advantages[:0]):
            assert nothing.shape == (0,)


def test_the_reward_decides_about_tapering() -> None:
    logps, old_logps, _, advantages = make_tokens()
    rewards = torch.linspace(-1, 1, 257, dtype=torch.float64)
    value, slope = run("tapered", logps, old_logps, advantages, hyper=(rewards,))
    ratio = (logps - old_logps).clamp(-20, 20).exp().clamp(max=1)
    close(slope, torch.where(rewards > 0, 1.0, ratio) * advantages)
    close(value, slope * logps)


@pytest.mark.parametrize(("pass_rate", "used"), [(0.0, 0.02), (1.0, 0.98), (0.5, 0.5)])
def test_pass_rates_keep_off_their_ends(pass_rate: float, used: float) -> None:
    value, slope = run("negative_aware", *one(-1.0, -0.8, -1.0), hyper=(pass_rate,))
    negative = (1 - used * math.exp(-0.2)) / (1 - used)
    close(value, torch.tensor([math.log(negative)], dtype=torch.float64))
    expected = -used * math.exp(-0.2) / (1 - used) / negative
    close(slope, torch.tensor([expected], dtype=torch.float64))


def test_objective_is_minus_the_surrogate_plus_the_penalties() -> None:
    logps, old_logps, ref_logps, advantages = make_tokens()
    penalties = (Regulariser(k3, 0.3), Regulariser(k3_is, 0.1), Regulariser(k3, 0.0))
    objective = Objective(clipped_ratio, (0.2, 0.28), penalties)
    weights = torch.linspace(0, 2, 257, dtype=torch.float64)
    result = evaluate(objective, logps, old_logps, ref_logps, advantages, weights)
    gains = run("clipped_ratio", logps, old_logps, advantages)
    parts = (
        gains,
        bind_torch(k3)(logps, ref_logps),
        bind_torch(k3_is)(logps, old_logps, ref_logps),
    )
    for got, gain, first, second in zip(result[:2], *parts, strict=True):
        close(got, 0.3 * first + 0.1 * second - weights * gain)
    assert torch.equal(result.clipped, (gains[1] == 0) & (advantages != 0))
