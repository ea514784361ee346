"""token_loss against its formulas written down once more, and golden values."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import token_loss
from fastrl_kernels.objectives import (
    Objective,
    Regulariser,
    clipped_ratio,
    importance_ratio,
    k1_score,
    k2,
    k3,
    policy_gradient,
    truncated_importance,
)
from fastrl_kernels.token_loss import token_loss_reference
from tests.kernels.token_cases import CLIP, S, Tokens, call, make_tokens


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and refuse operations without a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


METRICS = (
    "clip_high", "clip_low", "clip_dual", "entropy", "old_k1", "old_k2", "old_k3", "ref_k1",
    "ref_k2", "ref_k3",
)  # fmt: skip


def transcribe(tokens: Tokens, beta: float = 0.07, entropy_coef: float = 0.03) -> dict[str, Tensor]:
    """PPO-clip with 0.2 and 0.28, the k3 penalty and an entropy bonus; token by token."""
    loss = torch.zeros((), dtype=torch.float64)
    sums = dict.fromkeys(METRICS, 0.0)
    kappas, largest = [], 0.0
    clipped, num_counted = torch.zeros(len(tokens.logps), dtype=torch.bool), 0
    for row, weight in enumerate(tokens.token_weights.tolist()):
        if weight == 0:
            continue
        logp, advantage = tokens.logps[row], float(tokens.advantages[row])
        old_logp = logp.detach() if tokens.old_logps is None else tokens.old_logps[row]
        ref_logp = logp.detach() if tokens.ref_logps is None else tokens.ref_logps[row]
        kappa = 1.0 if tokens.rollout_weights is None else float(tokens.rollout_weights[row])
        ratio = (logp - old_logp).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        delta = logp - ref_logp
        value = -kappa * surrogate + beta * ((-delta).exp() - 1 + delta)
        loss = loss + weight * (value - entropy_coef * tokens.entropies[row])
        high = bool(ratio > 1.28 and advantage > 0)
        low = bool(ratio < 0.8 and advantage < 0)
        clipped[row] = high or low
        num_counted += 1
        kappas.append(kappa)
        largest = max(largest, float(ratio.detach()))
        sums["clip_high"] += high
        sums["clip_low"] += low
        sums["entropy"] += float(tokens.entropies[row].detach())
        for name, other in (("old", old_logp), ("ref", ref_logp)):
            delta = float((logp - other).detach())
            sums[f"{name}_k1"] += delta
            sums[f"{name}_k2"] += delta**2 / 2
            sums[f"{name}_k3"] += math.exp(-delta) - 1 + delta
    means = {
        name: torch.tensor(x, dtype=torch.float64) / max(1, num_counted) for name, x in sums.items()
    }
    square = num_counted * sum(kappa**2 for kappa in kappas)
    last = {"max_ratio": largest, "effective_samples": sum(kappas) ** 2 / (square or 1.0)}
    return {
        "loss": loss,
        "clipped": clipped,
        **means,
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in last.items()},
    }


def close(value: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(value.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, S])
@pytest.mark.parametrize("missing", [(), ("old_logps",), ("ref_logps", "rollout_weights")])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_loss_gradients_and_metrics(
    num_tokens: int, missing: tuple[str, ...], entropy_coef: float
) -> None:
    tokens = make_tokens(0, num_tokens)._replace(**dict.fromkeys(missing))
    leaves = [tokens.logps.requires_grad_(), tokens.entropies.requires_grad_()]
    beta = 0.0 if "ref_logps" in missing else 0.07
    truth = transcribe(tokens, beta, entropy_coef)
    expected = [torch.zeros_like(leaf) for leaf in leaves]
    if num_tokens:
        found = torch.autograd.grad(truth["loss"], leaves, allow_unused=True)
        expected = [zero if x is None else x for x, zero in zip(found, expected, strict=True)]
    settings: dict[str, Any] = {
        "objective": CLIP if beta else CLIP._replace(regularisers=()),
        "entropy_coef": entropy_coef,
    }  # fmt: skip
    for function in (token_loss, token_loss_reference):
        out = call(tokens, function, **settings)
        for name, value in truth.items():
            close(getattr(out, name).detach(), value.detach())
        grads = torch.autograd.grad(out.loss, leaves)
        for grad, other in zip(grads, expected, strict=True):
            close(grad, other)
        close(out.slopes, expected[0])
        assert [value.requires_grad for value in out] == [True] + [False] * (len(out) - 1)
    if num_tokens == S and not missing:
        assert 0.1 < out.clip_high < 0.4
        assert 0.1 < out.clip_low < 0.4


GOLDEN = [  # A, d, logp; value and slope of PPO-clip, the same of CISPO
    (1.0, 0.0, -1.0, 1.000000, 1.000000, -1.000000, 1.000000),
    (1.0, 0.4, -0.7, 1.280000, 0.000000, -1.044277, 1.491825),
    (1.0, -0.5, -1.5, 0.606531, 0.606531, -0.909796, 0.606531),
    (-1.0, 0.0, -1.0, -1.000000, -1.000000, 1.000000, -1.000000),
    (-1.0, 0.4, -0.7, -1.491825, -1.491825, 1.044277, -1.491825),
    (-1.0, -0.5, -1.5, -0.800000, 0.000000, 0.909796, -0.606531),
    (-1.0, 1.4, -0.2, -4.055200, -4.055200, 0.811040, -4.055200),
    (0.5, 0.1, -2.0, 0.552585, 0.552585, -1.105171, 0.552585),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "golden", GOLDEN, ids=lambda golden: f"A={golden[0]} d={golden[1]} logp={golden[2]}"
)
def test_golden_values(dtype: torch.dtype, golden: tuple[float, ...]) -> None:
    advantage, log_ratio, logp, clip, clip_slope, cispo, cispo_slope = golden
    # No ratio of the table is outside of CISPO's [0, 5], so that its slope is ratio times A.
    expected = {
        Objective(clipped_ratio, (0.2, 0.28)): (clip, clip_slope),
        Objective(truncated_importance, (1.0, 4.0)): (cispo, cispo_slope),
        Objective(importance_ratio): (cispo_slope, cispo_slope),
        Objective(policy_gradient): (advantage * logp, advantage),
    }
    one = torch.ones(1, dtype=dtype)
    for objective, (value, slope) in expected.items():
        out = token_loss(
            (logp * one).requires_grad_(), one, advantage * one, one, objective=objective,
            old_logps=(logp - log_ratio) * one,
        )  # fmt: skip
        close(-out.loss.detach(), torch.tensor(value), 1e-5 if dtype == torch.float32 else 1e-6)
        close(-out.slopes, torch.tensor([slope]), 1e-5 if dtype == torch.float32 else 1e-6)
        assert out.clipped.tolist() == [slope == 0]


@pytest.mark.parametrize("regulariser", [k1_score, k2, k3])
def test_penalties(regulariser: Any) -> None:
    """beta times the penalty, whatever the surrogate."""
    tokens = make_tokens(1)
    penalised = Objective(clipped_ratio, (0.2, 0.28), (Regulariser(regulariser, 0.5),))
    with_penalty = call(tokens, objective=penalised)
    without = call(tokens, objective=Objective(clipped_ratio, (0.2, 0.28)))
    delta = tokens.logps - tokens.ref_logps  # type: ignore[operator]
    formulas = {
        k1_score: (delta * tokens.logps, delta),
        k2: (delta**2 / 2, delta),
        k3: ((-delta).exp() - 1 + delta, 1 - (-delta).exp()),
    }
    value, slope = formulas[regulariser]
    close(with_penalty.loss - without.loss, 0.5 * (tokens.token_weights * value).sum())
    close(with_penalty.slopes - without.slopes, 0.5 * tokens.token_weights * slope)
    assert torch.equal(with_penalty.clipped, without.clipped)
    assert torch.equal(with_penalty.ref_k3, without.ref_k3)  # measured against in any case


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, -torch.inf])
def test_tokens_without_weight_may_hold_anything(dtype: torch.dtype, filling: float) -> None:
    tokens = make_tokens(2, dtype=dtype)
    masked = tokens.token_weights == 0
    spoilt = tokens._replace(
        **{
            name: x.masked_fill(masked, filling)
            for name, x in tokens._asdict().items()
            if name != "token_weights"
        }
    )
    results = []
    for each in (tokens, spoilt):
        leaves = [each.logps.requires_grad_(), each.entropies.requires_grad_()]
        out = call(each)
        results.append((*out, *torch.autograd.grad(out.loss, leaves)))
    for value, other in zip(*results, strict=True):
        assert torch.equal(value, other)
    for value in (results[1][1], results[1][2], *results[1][-2:]):
        assert torch.equal(value[masked], torch.zeros_like(value[masked]))


def test_no_token_counts() -> None:
    tokens = make_tokens(3)._replace(token_weights=torch.zeros(S, dtype=torch.float64))
    tokens = tokens._replace(logps=torch.full_like(tokens.logps, torch.nan).requires_grad_())
    out = call(tokens)
    (grad,) = torch.autograd.grad(out.loss, tokens.logps)
    for value in (*out, grad):
        assert torch.equal(value, torch.zeros_like(value))


def test_far_ratios_are_finite() -> None:
    """Log-ratios count as +-20 in exp, in the loss and in the metrics."""
    logps = torch.tensor([-1.0, -100.0, -1.0], dtype=torch.float64, requires_grad=True)
    old_logps = torch.tensor([-200.0, -1.0, -1.0], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    out = token_loss(
        logps, ones, -ones, ones, objective=Objective(importance_ratio), old_logps=old_logps
    )
    ratios = torch.tensor([20.0, -20.0, 0.0], dtype=torch.float64).exp()
    close(out.loss.detach(), ratios.sum(), 1e-6)
    assert out.slopes.tolist() == [0.0, 0.0, 1.0]
    close(out.old_k3, (1 / ratios - 1 + ratios.log()).sum() / 3, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_policy_slopes_are_exact(dtype: torch.dtype) -> None:
    tokens = make_tokens(4, dtype=dtype)._replace(rollout_weights=None)
    for old_logps in (None, tokens.logps.clone()):
        for objective in (
            Objective(policy_gradient),
            Objective(importance_ratio),
            Objective(clipped_ratio, (0.0, 0.0)),
            Objective(truncated_importance, (1.0, 4.0)),
        ):
            out = call(tokens._replace(old_logps=old_logps), objective=objective)
            assert torch.equal(out.slopes, -tokens.token_weights * tokens.advantages)
            assert not out.clipped.any()
            assert out.old_k3 == 0
            assert out.max_ratio == 1


def test_gradients_can_be_asked_for_again_and_scale_with_the_loss() -> None:
    tokens = make_tokens(5)
    leaves = [tokens.logps.requires_grad_(), tokens.entropies.requires_grad_()]
    out = call(tokens)
    first = torch.autograd.grad(out.loss / 4, leaves, retain_graph=True)
    second = torch.autograd.grad(out.loss, leaves)
    for grad, other in zip(first, second, strict=True):
        assert torch.equal(4 * grad, other)
    assert torch.equal(second[0], out.slopes)
    assert torch.equal(second[1], -0.03 * tokens.token_weights)
    tokens.entropies.requires_grad_(False)
    (alone,) = torch.autograd.grad(call(tokens).loss, tokens.logps)
    assert torch.equal(alone, second[0])


def test_inputs_that_are_not_contiguous_or_in_other_dtypes() -> None:
    tokens = make_tokens(6)
    expected = call(tokens)
    apart = Tokens._make(torch.stack([x, x + 1], 1)[:, 0] for x in tokens)  # type: ignore[operator]
    for value, other in zip(call(apart), expected, strict=True):
        assert torch.equal(value, other)
    narrow = tokens._replace(advantages=tokens.advantages.float(), token_weights=tokens[3].float())
    same = narrow._replace(advantages=narrow[2].double(), token_weights=narrow[3].double())
    for value, other in zip(call(narrow), call(same), strict=True):
        assert torch.equal(value, other)
