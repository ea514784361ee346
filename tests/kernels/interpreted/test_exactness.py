"""What must hold bit for bit: repetition, batches, ratios of 1, rows without a gradient."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import linear_logps, policy_loss
from fastrl_kernels.objectives import Objective, Regulariser, clipped_ratio, importance_ratio, k3
from fastrl_kernels.policy_loss import PolicyLoss
from tests.kernels.interpreted.conftest import (
    ENGINES,
    Case,
    S,
    make_case,
    trained,
    with_tokens,
)

RATIO = Objective(importance_ratio)
CLIPPED = Objective(clipped_ratio, (0.2, 0.28))
triton_logps = functools.partial(linear_logps, implementation="triton")


def loss_and_gradients(
    case: Case, tokens: dict[str, Tensor], **settings: Any
) -> tuple[PolicyLoss, tuple[Tensor, ...]]:
    leaves, tensors = trained(case)
    out = policy_loss(
        *leaves[:3], **tokens, temperature=leaves.temperature, implementation="triton", **settings
    )
    return out, torch.autograd.grad(out.loss, tensors)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_inputs_give_the_same_bits(engine: str) -> None:
    case, tokens = with_tokens(make_case("everything", torch.bfloat16))
    objective = CLIPPED._replace(regularisers=(Regulariser(k3, 0.1),))
    settings = {"objective": objective, "entropy_coef": 0.1, **ENGINES[engine]}
    first, second = (loss_and_gradients(case, tokens, **settings) for _ in range(2))
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["plain", "everything", "nf4"])
def test_a_row_alone_and_in_a_batch(name: str) -> None:
    case = make_case(name, torch.bfloat16)
    temperature = torch.linspace(0.5, 2, S)
    settings = {"batch_invariant": True}
    batch = triton_logps(*case[:3], temperature=temperature, **settings)
    for rows in ([0], [15, 16], [14, 4, 0, 8, 1], [*range(1, S)]):
        alone = triton_logps(
            case.hidden[rows], case.head, case.target_ids[rows], temperature=temperature[rows],
            **settings,
        )  # fmt: skip
        for value, all_values in zip(alone, batch, strict=True):
            assert torch.equal(value, all_values[rows])


@pytest.mark.parametrize("engine", ["one_pass", "min_memory"])
def test_gradients_of_a_row_alone_and_in_a_batch(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many programs as a small GPU has: fewer rows would share out the vocabulary to more."""
    from fastrl_kernels.policy_loss import launch

    monkeypatch.setattr(launch, "ENOUGH_PROGRAMS", 4)
    case = make_case("plain", torch.float32, rows=37, columns=403)
    tokens = {"advantages": torch.linspace(-1, 2, 37), "token_weights": torch.ones(37)}

    def run(rows: slice, **settings: Any) -> list[torch.Tensor]:
        hidden = case.hidden[rows].detach().requires_grad_()
        weight = case.head.weight.detach().requires_grad_()
        out = policy_loss(
            hidden, weight, case.target_ids[rows],
            **{name: value[rows] for name, value in tokens.items()}, objective=RATIO,
            engine=engine, batch_invariant=True, implementation="triton", **settings,
        )  # fmt: skip
        return [out.logps.detach(), *torch.autograd.grad(out.loss, hidden)]

    together = run(slice(None))
    for row in (1, 18, 36):
        for alone, value in zip(run(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone[0], value[row])
    if engine == "one_pass":
        with pytest.raises(ValueError, match='batch_invariant needs products="gather"'):
            run(slice(None), products="cublas")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "everything", "nf4"])
def test_on_policy_every_ratio_is_exactly_1(name: str, dtype: torch.dtype) -> None:
    """Statistics of linear_logps and of the one pass are the same bits, so slopes are -A w."""
    case = make_case(name, dtype)
    old_logps = triton_logps(*case[:3], temperature=case.temperature, batch_invariant=True).logps
    tokens = {
        "advantages": torch.linspace(-1, 1, S), "token_weights": torch.linspace(0.1, 1, S),
        "old_logps": old_logps,
    }  # fmt: skip
    case, _ = trained(case)
    for engine in ("gather", "min_memory"):
        out = policy_loss(
            *case[:3], **tokens, temperature=case.temperature, objective=RATIO,
            batch_invariant=True, implementation="triton", **ENGINES[engine],
        )  # fmt: skip
        counted = case.target_ids >= 0
        assert torch.equal(out.logps, old_logps)
        assert torch.equal(out.slopes, (-tokens["advantages"] * tokens["token_weights"]) * counted)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_rows_without_a_slope_have_no_gradient(name: str, engine: str) -> None:
    """Ignored, of weight 0, of advantage 0 or clipped."""
    case, tokens = with_tokens(make_case(name, torch.float32))
    del tokens["ref_logps"]
    tokens["old_logps"][:4] -= 1
    tokens["advantages"][:2] = 1
    out, gradients = loss_and_gradients(case, tokens, objective=CLIPPED, **ENGINES[engine])
    assert out.clipped[:2].all()
    idle = out.slopes == 0
    assert 6 < idle.sum() < S
    assert not gradients[0][idle].any()
    assert gradients[0][~idle].any(1).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reason", ["ignored", "weight 0", "advantage 0"])
def test_no_row_with_a_slope(engine: str, reason: str) -> None:
    case, tokens = with_tokens(make_case("everything", torch.bfloat16))
    if reason == "ignored":
        case = case._replace(target_ids=torch.full((S,), -100))
    elif reason == "weight 0":
        tokens["token_weights"] = torch.zeros(S)
    else:
        tokens["advantages"] = torch.zeros(S)
    out, gradients = loss_and_gradients(case, tokens, objective=CLIPPED, **ENGINES[engine])
    assert out.loss == 0
    assert not out.slopes.any()
    assert not any(grad.any() for grad in gradients)
    if reason != "advantage 0":
        assert not out.logps.any()
        assert not out.entropies.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_do_not_count_overflow_nowhere(engine: str) -> None:
    """Nobody knows their normaliser, and exp(100) is infinite, of which 0 times makes NaN."""
    case, tokens = with_tokens(make_case("bias", torch.float32))
    assert case.head.bias is not None
    case = case._replace(head=case.head._replace(bias=case.head.bias + 100))
    _, gradients = loss_and_gradients(case, tokens, objective=CLIPPED, **ENGINES[engine])
    assert all(grad.isfinite().all() for grad in gradients)


def test_a_row_of_weight_0_may_hold_nan_and_change_nothing() -> None:
    """The gradients of the head are those of the other rows alone, bit for bit."""
    case, tokens = with_tokens(make_case("everything", torch.float32))
    settings = {"objective": CLIPPED, "entropy_coef": 0.1, **ENGINES["gather"]}
    counted = (tokens["token_weights"] != 0) & (case.target_ids >= 0)
    _, gradients = loss_and_gradients(case, tokens, **settings)
    some = {name: values[counted] for name, values in tokens.items()}
    assert isinstance(case.temperature, Tensor)
    fewer = Case(
        case.hidden[counted], case.head, case.target_ids[counted], case.temperature[counted]
    )
    _, expected = loss_and_gradients(fewer, some, **settings)
    for grad, other in zip(gradients[1:4], expected[1:4], strict=True):
        assert torch.equal(grad, other)
