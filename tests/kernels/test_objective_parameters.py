"""Parameters of an objective as tensors, several regularisers, and functions that call others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import policy_loss, token_loss
from fastrl_kernels.objectives import (
    Objective,
    Regulariser,
    clamped_ratio,
    clipped_ratio,
    importance_ratio,
    k2,
    k3,
    kernel_function,
    policy_gradient,
    tl,
)
from fastrl_kernels.policy_loss import policy_loss_reference
from tests.kernels.policy_cases import ENGINES, Case, S, loss_and_gradients, make_case, run
from tests.kernels.token_cases import call, make_tokens


def drift(logp, old_logp, power):  # type: ignore[no-untyped-def]
    """|d|^power / power, of the distance to the old policy."""
    distance = tl.abs(logp - old_logp)
    slope = tl.exp((power - 1.0) * tl.log(distance + 1e-300))
    return slope * distance / power, tl.where(logp > old_logp, slope, -slope)


def weighted_k3(logp, old_logp, ref_logp):  # type: ignore[no-untyped-def]
    """rho k3, with the derivative of both factors."""
    ratio, ratio_slope = clamped_ratio(logp - old_logp)
    inverse, inverse_slope = clamped_ratio(ref_logp - logp)
    value = inverse - 1.0 + logp - ref_logp
    return ratio * value, ratio_slope * value + ratio * (1.0 - inverse_slope)


@kernel_function
def squared(value):  # type: ignore[no-untyped-def]
    return value * value


def squared_ratio(logp, old_logp, advantage):  # type: ignore[no-untyped-def]
    ratio, slope = clamped_ratio(logp - old_logp)
    return advantage * squared(ratio), 2.0 * advantage * ratio * slope


def same(one: Any, other: Any) -> None:
    for value, expected in zip(one, other, strict=True):
        assert torch.equal(value, expected)


def spread(values: tuple[float, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.full_like(like, value) for value in values)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(), (1,), (S,)])
def test_a_tensor_is_worth_its_number(engine: str, shape: tuple[int, ...]) -> None:
    case = make_case(0)
    like = torch.zeros(shape, dtype=torch.float64)
    low, high, beta, coefficient = spread((0.2, 0.28, 0.07, 0.03), like)
    settings: dict[str, Any] = {"engine": engine}
    tensors = Objective(clipped_ratio, (low, high), (Regulariser(k3, beta),))
    numbers = Objective(clipped_ratio, (0.2, 0.28), (Regulariser(k3, 0.07),))
    out, grads = loss_and_gradients(case, objective=tensors, entropy_coef=coefficient, **settings)
    expected, others = loss_and_gradients(case, objective=numbers, entropy_coef=0.03, **settings)
    same((*out, *grads), (*expected, *others))


@pytest.mark.parametrize("engine", ENGINES)
def test_each_token_has_its_own_parameters(engine: str) -> None:
    """Every other token under other parameters: the sum of two calls with half the weights."""
    case = make_case(1)
    first = torch.arange(S) % 2 == 0
    pairs = [(0.05, 0.4), (0.1, 0.5), (0.3, 0.01), (0.0, 0.2)]
    low, high, beta, coefficient = (
        torch.where(first, *torch.tensor(pair, dtype=torch.float64)) for pair in pairs
    )
    objective = Objective(clipped_ratio, (low, high), (Regulariser(k3, beta),))
    out, grads = loss_and_gradients(
        case, engine=engine, objective=objective, entropy_coef=coefficient
    )
    losses, halves = [], []
    for part, mask in ((0, first), (1, ~first)):
        numbers = [pair[part] for pair in pairs]
        half = case._replace(token_weights=case.token_weights * mask)
        objective = Objective(clipped_ratio, tuple(numbers[:2]), (Regulariser(k3, numbers[2]),))
        result, some = loss_and_gradients(
            half, engine=engine, objective=objective, entropy_coef=numbers[3]
        )
        losses.append(result)
        halves.append(some)
    torch.testing.assert_close(out.loss, losses[0].loss + losses[1].loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.slopes, losses[0].slopes + losses[1].slopes, rtol=1e-12, atol=0)
    for grad, *parts in zip(grads, *halves, strict=True):
        torch.testing.assert_close(grad, sum(parts), rtol=1e-10, atol=1e-13)


REGULARISERS = (
    Regulariser(k3, 0.1),
    Regulariser(drift, 0.2, (1.5,)),
    Regulariser(weighted_k3, 0.05),
    Regulariser(k2, 0.0),
)


@pytest.mark.parametrize("engine", ENGINES)
def test_regularisers_add_up(engine: str) -> None:
    case = make_case(2)
    objective = Objective(squared_ratio, (), REGULARISERS)
    out, grads = loss_and_gradients(case, engine=engine, objective=objective, entropy_coef=0.0)
    kept = (case.target_ids >= 0) & (case.token_weights != 0)
    logps = out.logps[kept].requires_grad_()
    old_logps, ref_logps = (x[kept] for x in (case.old_logps, case.ref_logps))  # type: ignore[index]
    ratio, delta = (logps - old_logps).exp(), logps - ref_logps
    k3_values = (-delta).exp() - 1 + delta
    gain = case.advantages[kept] * ratio**2 * case.rollout_weights[kept]  # type: ignore[index]
    values = 0.1 * k3_values + 0.2 * (logps - old_logps).abs() ** 1.5 / 1.5
    values = values + 0.05 * ratio * k3_values - gain
    loss = (case.token_weights[kept] * values).sum()
    (slopes,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.slopes[kept], slopes, rtol=1e-9, atol=1e-12)
    reference = run(case, function=policy_loss_reference, objective=objective, entropy_coef=0.0)
    for grad, other in zip(grads, torch.autograd.grad(reference.loss, case.leaves()), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-11)


def test_ref_logps_are_needed_where_a_regulariser_reads_them() -> None:
    tokens = make_tokens(3)._replace(ref_logps=None)
    call(tokens, objective=Objective(policy_gradient, (), (Regulariser(drift, 1.0, (2.0,)),)))
    call(tokens, objective=Objective(policy_gradient, (), (Regulariser(k3, 0.0),)))
    for regulariser in (Regulariser(k3, 0.1), Regulariser(weighted_k3), Regulariser(k3, beta())):
        with pytest.raises(ValueError, match="needs ref_logps"):
            call(tokens, objective=Objective(policy_gradient, (), (regulariser,)))


def beta() -> Tensor:
    """Zero, which a tensor does not show without waiting for the device."""
    return torch.zeros(1, dtype=torch.float64)


def misnamed(p, q):  # type: ignore[no-untyped-def]
    return p - q, 1.0


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective(clipped_ratio, (torch.zeros(2), 0.2)), "epsilon_low of .* must be a number"),
        (Objective(clipped_ratio, (0.2, torch.zeros(1).int())), "epsilon_high of"),
        (Objective(clipped_ratio, (0.2, float("nan"))), "epsilon_high of .* got NaN"),
        (Objective(clipped_ratio, (0.2,)), r"takes 2 hyper_parameters \(epsilon_low, epsilon_"),
        (Objective(policy_gradient, (), (k3,)), "tuple of Regulariser"),  # type: ignore[arg-type]
        (Objective(policy_gradient, (), (Regulariser(misnamed),)), "must begin with"),
        (Objective(policy_gradient, (), (Regulariser(k3, torch.ones(2)),)), "coefficient of"),
        (Objective(policy_gradient, (), (Regulariser(drift),)), "takes 1 hyper_parameters"),
    ],
)
def test_parameters_that_do_not_fit(objective: Objective, message: str) -> None:
    tokens = make_tokens(4)
    with pytest.raises(ValueError, match=message):
        call(tokens, objective=objective)
    case = make_case(0)
    with pytest.raises(ValueError, match=message):
        run(case, objective=objective)


def test_no_number_compiles_a_function_anew() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def compiled(case: Case, epsilon: float, beta: float, coefficient: float) -> Tensor:
        objective = Objective(clipped_ratio, (epsilon, epsilon), (Regulariser(k3, beta),))
        return policy_loss(
            case.hidden_states, case.head, case.target_ids, case.advantages, case.token_weights,
            objective=objective, old_logps=case.old_logps, ref_logps=case.ref_logps,
            entropy_coef=coefficient,
        ).loss  # fmt: skip

    case = make_case(5).to(torch.float32)
    for step in range(1, 13):
        compiled(case, 0.01 * step, 0.1 / step, 0.001 * step)
    assert len(graphs) <= 2  # the first takes every number for a constant


def test_the_objective_is_a_constant() -> None:
    tokens = make_tokens(6)
    epsilon = torch.full_like(tokens.logps, 0.2).requires_grad_()
    tokens.logps.requires_grad_()
    out = token_loss(
        tokens.logps, tokens.entropies, tokens.advantages, tokens.token_weights,
        objective=Objective(clipped_ratio, (epsilon, 0.3)), old_logps=tokens.old_logps,
    )  # fmt: skip
    out.loss.backward()
    assert epsilon.grad is None
    assert tokens.logps.grad is not None


def test_an_objective_may_call_another() -> None:
    tokens = make_tokens(7)._replace(rollout_weights=None)
    log_ratio = 2 * (tokens.logps - tokens.old_logps)  # type: ignore[operator]
    expected = -(tokens.token_weights * tokens.advantages * log_ratio.exp()).sum()
    out = call(tokens, objective=Objective(squared_ratio), entropy_coef=0.0)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    assert not torch.equal(out.loss, call(tokens, objective=Objective(importance_ratio)).loss)
