"""Regularisers: value == formula, slope == derivative, and the expected gradients they are for."""

import itertools

import pytest
import torch
from torch import Tensor

from fastrl_kernels.objectives import REGULARISERS, Regulariser, bind_torch
from tests.objective_formulas import REGULARISER_FORMULAS, close, make_tokens

NAMES = sorted(REGULARISERS)
TOWARDS_REF = ["k1_score", "k2", "k3_plus", "k3_is", "k2_is"]


def run(name: str, logps: Tensor, old_logps: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor]:
    function = REGULARISERS[name]
    given = {"logp": logps, "old_logp": old_logps, "ref_logp": ref_logps}
    return bind_torch(function)(*(given[x] for x in Regulariser(function).inputs))


@pytest.mark.parametrize("name", NAMES)
def test_value_is_the_formula(name: str) -> None:
    logps, old_logps, ref_logps, _ = make_tokens()
    value, _ = run(name, logps, old_logps, ref_logps)
    given = {"logp": logps, "old_logp": old_logps, "ref_logp": ref_logps}
    columns = [given[x].tolist() for x in Regulariser(REGULARISERS[name]).inputs]
    expected = [REGULARISER_FORMULAS[name](*token) for token in zip(*columns, strict=True)]
    close(value, torch.tensor(expected, dtype=torch.float64))


DIFFERENTIATED = ("k1_score", "k3_plus", "k2_is", "entropy_sample", "jensen_shannon_likelihood")


def differentiable(name: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The formula, its constants detached: of these the code hides the slope from autograd."""
    delta = logp - ref_logp
    if name == "jensen_shannon_likelihood":
        return -torch.nn.functional.logsigmoid(delta)
    if name == "k1_score":
        return delta.detach() * logp
    if name == "k3_plus":
        return delta.square() / 2
    if name == "k2_is":
        return (logp - old_logp).clamp(-20, 20).exp().detach() * delta.square() / 2
    assert name == "entropy_sample"
    return logp.detach() * logp


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_derivative(name: str) -> None:
    logps, old_logps, ref_logps, _ = make_tokens()
    tokens = (logps.requires_grad_(), old_logps, ref_logps)
    value, slope = run(name, *tokens)
    if name in DIFFERENTIATED:
        value = differentiable(name, *tokens)
    (gradient,) = torch.autograd.grad(value.sum(), logps)
    close(slope.detach(), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtype_is_kept_and_float32_is_accurate(name: str, dtype: torch.dtype) -> None:
    logps, old_logps, ref_logps, _ = (x.to(dtype) for x in make_tokens())
    result = run(name, logps, old_logps, ref_logps)
    truth = run(name, logps.double(), old_logps.double(), ref_logps.double())
    for got, expected in zip(result, truth, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("delta", "k1", "half_square", "schulman", "slope", "weighted", "weighted_slope"),
    [
        (-1.0, -1.0, 0.5, 0.718282, -1.718282, 0.793824, -1.105171),
        (-0.1, -0.1, 0.005, 0.005171, -0.105171, 0.005715, -0.110517),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.1, 0.1, 0.005, 0.004837, 0.095163, 0.005346, 0.110517),
        (1.0, 1.0, 0.5, 0.367879, 0.632121, 0.406570, 1.105171),
    ],
)
def test_golden_values(
    delta: float, k1: float, half_square: float, schulman: float, slope: float, weighted: float,
    weighted_slope: float,
) -> None:  # fmt: skip
    """rho is exp(0.1)."""
    logp = torch.tensor(-2.0, dtype=torch.float64)
    expected = {
        "k1_score": (-2 * k1, k1),
        "k2": (half_square, k1),
        "k3": (schulman, slope),
        "k3_plus": (schulman, k1),
        "k3_is": (weighted, weighted_slope),
        "k2_is": (1.105171 * half_square, weighted_slope),
    }
    for name, numbers in expected.items():
        result = run(name, logp, logp - 0.1, logp - delta)
        assert [float(x) for x in result] == pytest.approx(numbers, abs=1e-6), name


@pytest.mark.parametrize("name", TOWARDS_REF)
def test_on_policy_slope_is_delta(name: str) -> None:
    logps, _, ref_logps, _ = (x[3:] for x in make_tokens())
    _, slope = run(name, logps, logps, ref_logps)
    assert torch.equal(slope, logps - ref_logps)


class Policies:
    """Three distributions over seven words; the gradient is with respect to the first's logits."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(3, 7, generator=generator, dtype=torch.float64)
        self.logits = logits[0].clone().requires_grad_()
        self.logps = self.logits.log_softmax(0)
        self.old_logps, self.ref_logps = logits[1:].log_softmax(1)

    def expected_gradient(self, name: str, sampler_logps: Tensor) -> Tensor:
        """Of a penalty over every word, weighted by how often the sampler draws it."""
        _, slopes = run(name, self.logps.detach(), self.old_logps, self.ref_logps)
        return self.gradient((sampler_logps.detach().exp() * slopes * self.logps).sum())

    def gradient(self, divergence: Tensor) -> Tensor:
        return torch.autograd.grad(divergence, self.logits, retain_graph=True)[0]


def kl(logps: Tensor, others: Tensor) -> Tensor:
    return (logps.exp() * (logps - others)).sum()


@pytest.mark.parametrize(
    "name",
    [
        "k1_score", "k2", "k3", "k3_old", "k3_plus", "absolute", "absolute_old", "squared_old",
        "entropy_sample", "negative_log_likelihood",
    ],
)  # fmt: skip
def test_expected_gradient_on_policy(name: str) -> None:
    policies = Policies()
    logps, old_logps, ref_logps = policies.logps, policies.old_logps, policies.ref_logps
    reverse = kl(logps, ref_logps)
    divergence = {
        "k1_score": reverse,
        "k2": reverse,
        "k3_plus": reverse,
        "k3": kl(ref_logps, logps),
        "k3_old": kl(old_logps, logps),
        "absolute": (logps.exp() - ref_logps.exp()).abs().sum(),
        "absolute_old": (logps.exp() - old_logps.exp()).abs().sum(),
        "squared_old": 2 * kl(logps, old_logps),
        "entropy_sample": (logps.exp() * logps).sum(),
        "negative_log_likelihood": 0 * logps.sum(),
    }[name]
    close(policies.expected_gradient(name, logps), policies.gradient(divergence), 1e-10)


@pytest.mark.parametrize("name", ["k3_is", "k2_is"])
def test_expected_gradient_from_the_old_policy(name: str) -> None:
    policies = Policies()
    reverse = policies.gradient(kl(policies.logps, policies.ref_logps))
    close(policies.expected_gradient(name, policies.old_logps), reverse, 1e-10)
    biased = policies.expected_gradient("k2", policies.old_logps)
    assert (biased - reverse).abs().max() > 1e-3


EXTREMES = list(itertools.product((0.0, -1e-6, -50.0, -1e4), repeat=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_tokens_give_finite_numbers(name: str, dtype: torch.dtype) -> None:
    logps, old_logps, ref_logps = torch.tensor(EXTREMES, dtype=dtype).T
    value, slope = run(name, logps, old_logps, ref_logps)
    assert value.isfinite().all()
    assert slope.isfinite().all()
    if name in ("k3", "k3_old", "k3_is", "hellinger_likelihood"):
        outside = (logps - (old_logps if name == "k3_old" else ref_logps)).abs() > 20
        if name == "k3_is":
            outside |= (logps - old_logps).abs() > 20
        assert outside.any()
        assert not slope[outside].any()


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden(name: str) -> None:
    logps, old_logps, ref_logps, _ = make_tokens()
    value, _ = run(name, logps * torch.nan, old_logps, ref_logps)
    assert value.isnan().all()


def test_the_absolute_difference_has_no_slope_at_its_kink() -> None:
    logps = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    others = logps + torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)
    for name in ("absolute", "absolute_old"):
        value, slope = run(name, logps, others, others)
        assert slope.tolist() == [1.0, 0.0, -1.0]
        assert torch.equal(value, (logps - others).abs())
