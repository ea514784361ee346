"""token_loss: values, slopes and metrics of every objective, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels.objectives import (
    Objective,
    Regulariser,
    clipped_ratio,
    importance_ratio,
    k1_score,
    k2,
    k3,
    policy_gradient,
    tl,
    truncated_importance,
)
from fastrl_kernels.token_loss import TokenLoss, token_loss, token_loss_reference

OBJECTIVES = [
    Objective(clipped_ratio, (0.2, 0.28), (Regulariser(k3, 0.1),)),
    Objective(truncated_importance, (1.0, 0.5), (Regulariser(k2, 0.5),)),
    Objective(importance_ratio, (), (Regulariser(k1_score, 0.05),)),
    Objective(policy_gradient),
]
OPTIONS = ("old_logps", "ref_logps", "rollout_weights")


def make_tokens(num_tokens: int) -> dict[str, Tensor]:
    """Per-token numbers; those of weight 0 hold NaN, and some advantages are 0."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(num_tokens, generator=generator)

    tokens = {"logps": normal() - 3, "entropies": normal().abs(), "advantages": normal()}
    tokens["old_logps"] = tokens["logps"] + 0.3 * normal()
    tokens["ref_logps"] = tokens["logps"] + 0.5 * normal()
    tokens["rollout_weights"] = torch.rand(num_tokens, generator=generator)
    tokens["advantages"][1::6] = 0
    tokens["old_logps"][2::50] += 25  # past the clamp of the log-ratio
    for values in tokens.values():
        values[3::7] = torch.nan
    tokens["token_weights"] = torch.rand(num_tokens, generator=generator) / max(1, num_tokens)
    tokens["token_weights"][3::7] = 0
    return tokens


def run(
    tokens: dict[str, Tensor], options: tuple[str, ...], dtype: torch.dtype, **settings: Any
) -> tuple[TokenLoss, tuple[Tensor, ...]]:
    """The result, and its gradients with respect to logps and entropies."""
    given = {name: x.to(dtype) for name, x in tokens.items() if name in options}
    logps, entropies = (tokens[x].to(dtype).requires_grad_() for x in ("logps", "entropies"))
    function = token_loss_reference if dtype == torch.float64 else token_loss
    constants = (tokens["advantages"].to(dtype), tokens["token_weights"].to(dtype))
    out = function(logps, entropies, *constants, **given, **settings)
    return out, torch.autograd.grad(3 * out.loss, (logps, entropies), materialize_grads=True)


def check(tokens: dict[str, Tensor], options: tuple[str, ...], **settings: Any) -> None:
    out, gradients = run(tokens, options, torch.float32, implementation="triton", **settings)
    truth, expected = run(tokens, options, torch.float64, **settings)
    for name, value, wide in zip(TokenLoss._fields, out, truth, strict=True):
        torch.testing.assert_close(value.to(wide.dtype), wide, rtol=2e-5, atol=1e-7, msg=name)
    uncounted = tokens["token_weights"] == 0
    assert not out.slopes[uncounted].any()
    for grad, wide in zip(gradients, expected, strict=True):
        assert not grad[uncounted].any()
        torch.testing.assert_close(grad.double(), wide, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda x: x.surrogate.__name__)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_every_objective(objective: Objective, entropy_coef: float) -> None:
    check(make_tokens(123), OPTIONS, objective=objective, entropy_coef=entropy_coef)


@pytest.mark.parametrize("options", [(), ("old_logps",), ("ref_logps",), ("rollout_weights",)])
def test_every_optional_tensor_alone(options: tuple[str, ...]) -> None:
    check(make_tokens(37), options, objective=Objective(clipped_ratio, (0.2, 0.28)))


@pytest.mark.parametrize("num_tokens", [0, 1, 1024, 1025, 2500])
def test_sizes_around_the_block(num_tokens: int) -> None:
    check(make_tokens(num_tokens), OPTIONS, objective=OBJECTIVES[0])


def test_only_tokens_of_weight_0() -> None:
    tokens = {name: torch.full((37,), torch.nan) for name in make_tokens(1)}
    tokens["token_weights"] = torch.zeros(37)
    check(tokens, OPTIONS, objective=OBJECTIVES[0], entropy_coef=0.1)


def test_elements_apart_in_memory() -> None:
    tokens = make_tokens(37)
    apart = {name: torch.stack([x, x * 0 + 7], 1)[:, 0] for name, x in tokens.items()}
    apart["rollout_weights"] = torch.full((1,), 0.5).expand(37)
    check(apart, OPTIONS, objective=OBJECTIVES[0], entropy_coef=0.1)


def test_a_ratio_of_the_same_policy_is_exactly_1() -> None:
    tokens = make_tokens(37)
    tokens["old_logps"] = tokens["logps"].clone()
    tokens["advantages"] = torch.ones(37)
    out, _ = run(
        tokens, ("old_logps",), torch.float32, objective=Objective(importance_ratio),
        implementation="triton",
    )  # fmt: skip
    assert torch.equal(out.slopes, -tokens["token_weights"])
    assert out.old_k3 == 0
    assert out.max_ratio == 1


def own_drift(logp, old_logp, scale):  # type: ignore[no-untyped-def]
    """scale d^2 / 2, of the distance to the old policy."""
    distance = logp - old_logp
    return 0.5 * scale * tl.abs(distance) * tl.abs(distance), scale * distance


def own_joint(logp, old_logp, ref_logp):  # type: ignore[no-untyped-def]
    """(logp - old_logp) (logp - ref_logp)"""
    return (logp - old_logp) * (logp - ref_logp), 2.0 * logp - old_logp - ref_logp


@pytest.mark.parametrize("num_tokens", [7, 1100])
def test_parameters_as_tensors_and_several_regularisers(num_tokens: int) -> None:
    tokens = make_tokens(num_tokens)
    one = torch.rand(num_tokens, generator=torch.Generator().manual_seed(1))
    two = torch.full((1,), 0.3)
    regularisers = (
        Regulariser(own_drift, 0.2, (one,)),
        Regulariser(k3, one),
        Regulariser(own_joint, two),
    )
    objective = Objective(clipped_ratio, (one, two), regularisers)
    tokens["old_logps"][2::50] -= 25  # the square of a distance of 25 has no accurate sum
    check(tokens, OPTIONS, objective=objective, entropy_coef=one)
