"""Value == transcription, slope == autograd of the value, golden values, on-policy identities."""

import pytest
import torch

from fastrl_kernels.objectives import (
    REGULARISERS,
    SURROGATES,
    Objective,
    bind_torch,
    clipped_ratio,
    evaluate,
    k1_score,
    k2,
    k3,
)

HYPER = {
    "policy_gradient": (),
    "importance_ratio": (),
    "clipped_ratio": (0.2, 0.28),
    "truncated_importance": (1.0, 4.0),
}


def transcription(name: str, logp, old_logp, advantage):
    """Each surrogate as its paper writes it, with stop-gradients as detach."""
    ratio = torch.exp((logp - old_logp).clamp(-20, 20))
    if name == "policy_gradient":
        return advantage * logp
    if name == "importance_ratio":
        return ratio * advantage
    if name == "clipped_ratio":
        return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    assert name == "truncated_importance"
    return ratio.clamp(0.0, 5.0).detach() * advantage * logp


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(257, generator=generator, dtype=torch.float64)
    old_logps = logps - 0.5 * torch.randn(257, generator=generator, dtype=torch.float64)
    old_logps[:3] = logps[:3] + torch.tensor([25.0, -25.0, 0.0])
    advantages = torch.randn(257, generator=generator, dtype=torch.float64)
    advantages[5] = 0.0
    return logps.requires_grad_(), old_logps, advantages


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_surrogate_is_its_transcription_and_slope_its_derivative(name, tokens):
    logps, old_logps, advantages = tokens
    expected = transcription(name, logps, old_logps, advantages)
    (gradient,) = torch.autograd.grad(expected.sum(), logps)
    value, slope = bind_torch(SURROGATES[name])(logps, old_logps, advantages, *HYPER[name])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_on_policy_slope_is_the_advantage(name, tokens):
    logps, _, advantages = tokens
    _, slope = bind_torch(SURROGATES[name])(logps, logps, advantages, *HYPER[name])
    assert torch.equal(slope, advantages)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "value", "slope"),
    [
        (1.0, 0.0, 1.000000, 1.000000),
        (1.0, 0.4, 1.280000, 0.000000),
        (1.0, -0.5, 0.606531, 0.606531),
        (-1.0, 0.4, -1.491825, -1.491825),
        (-1.0, -0.5, -0.800000, 0.000000),
        (-1.0, 1.4, -4.055200, -4.055200),
        (0.5, 0.1, 0.552585, 0.552585),
    ],
)
def test_clipped_ratio_golden_values(advantage, log_ratio, value, slope):
    logp = torch.tensor(-1.0, dtype=torch.float64)
    one = torch.tensor(advantage, dtype=torch.float64)
    result = bind_torch(clipped_ratio)(logp, logp - log_ratio, one, 0.2, 0.28)
    assert [float(x) for x in result] == pytest.approx([value, slope], abs=1e-6)


@pytest.mark.parametrize(
    ("delta", "values", "slopes"),
    [
        (-1.0, (0.5, 0.718282), (-1.0, -1.718282)),
        (-0.1, (0.005, 0.005171), (-0.1, -0.105171)),
        (0.0, (0.0, 0.0), (0.0, 0.0)),
        (1.0, (0.5, 0.367879), (1.0, 0.632121)),
    ],
)
def test_regulariser_golden_values(delta, values, slopes):
    logp = torch.tensor(-2.0, dtype=torch.float64)
    for function, value, slope in zip((k2, k3), values, slopes, strict=True):
        result = bind_torch(function)(logp, logp - delta)
        assert [float(x) for x in result] == pytest.approx([value, slope], abs=1e-6)


def test_regularisers_have_the_expected_gradients_on_a_small_vocabulary():
    """E[delta dlogp] = grad KL(theta || ref); E[(1 - e^-delta) dlogp] = grad KL(ref || theta)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    reverse = (logp.exp() * (logp - ref)).sum()
    forward = (ref.exp() * (ref - logp)).sum()
    for function, divergence in ((k1_score, reverse), (k2, reverse), (k3, forward)):
        _, slopes = bind_torch(function)(logp.detach(), ref)
        expectation = (logp.detach().exp() * slopes * logp).sum()
        got = torch.autograd.grad(expectation, logits, retain_graph=True)[0]
        want = torch.autograd.grad(divergence, logits, retain_graph=True)[0]
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(REGULARISERS))
def test_objective_adds_the_penalty(name, tokens):
    logps, old_logps, advantages = tokens
    ref_logps = old_logps.roll(1)
    objective = Objective(clipped_ratio, (0.2, 0.28), REGULARISERS[name], beta=0.3)
    result = evaluate(objective, logps, old_logps, ref_logps, advantages)
    gain, gain_slope = bind_torch(clipped_ratio)(logps, old_logps, advantages, 0.2, 0.28)
    penalty, penalty_slope = bind_torch(REGULARISERS[name])(logps, ref_logps)
    torch.testing.assert_close(result.values, 0.3 * penalty - gain)
    torch.testing.assert_close(result.slopes, 0.3 * penalty_slope - gain_slope)
    assert not result.values.requires_grad


def test_penalty_without_reference_is_refused(tokens):
    logps, old_logps, advantages = tokens
    with pytest.raises(ValueError, match="ref_logps"):
        evaluate(Objective(clipped_ratio, (0.2, 0.2), k3, 0.1), logps, old_logps, None, advantages)
