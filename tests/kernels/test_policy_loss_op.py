"""policy_loss as an operator: fakes, torch.compile, autocast, objectives of the caller's own."""

import functools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl_kernels import LMHead, policy_loss
from fastrl_kernels.head_arguments import NUM_TENSORS, to_arguments
from fastrl_kernels.objectives import (
    Objective,
    Regulariser,
    clipped_ratio,
    importance_ratio,
    k3,
    policy_gradient,
    tl,
)
from fastrl_kernels.objectives.arguments import to_arguments as objective_to_arguments
from fastrl_kernels.policy_loss.op import policy_loss_op
from tests.kernels.policy_cases import (
    ENGINES,
    OBJECTIVE,
    TENSORS,
    Case,
    loss_and_gradients,
    make_case,
    random_nf4,
    run,
)


def op_arguments(case: Case, objective: Objective, needs_grad: list[bool]) -> tuple[Any, ...]:
    """All that the operator takes, in float32 and in its order."""
    arguments = to_arguments(case.head)
    tokens = (case.advantages, case.token_weights, case.old_logps, case.ref_logps)
    constants = [x if x is None else x.float() for x in (*tokens, case.rollout_weights)]
    return (
        case.hidden_states, *arguments[:NUM_TENSORS], case.target_ids,
        torch.full(case.target_ids.shape, 0.7), *constants, *arguments[NUM_TENSORS:],
        *objective_to_arguments(objective, 0.1, torch.float32, torch.device("cpu")), 1.0, False,
        False, "torch", "auto", needs_grad,
    )  # fmt: skip


# Tracing forward and backward together, which "test_aot_dispatch_dynamic" does, needs outputs that
# no backward changes; that of policy_loss scales its gradients in place, and they are outputs of
# the operator, if of nothing that users call.
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_operator_passes_opcheck() -> None:
    case = make_case(0, softcap=3.0, vocab_size=117, lora_scale=0.5).to(torch.float32)
    arguments = op_arguments(case, OBJECTIVE, [False] * 5)
    torch.library.opcheck(policy_loss_op, arguments)
    case.leaves()
    arguments = op_arguments(case, OBJECTIVE, [True] * 5)
    torch.library.opcheck(policy_loss_op, arguments, test_utils=OPCHECKS)
    some = make_case(0, lora_a=None, lora_b=None).to(torch.float32)
    some = some._replace(old_logps=None, ref_logps=None, rollout_weights=None)
    some.head.weight.requires_grad_()  # type: ignore[union-attr]
    arguments = op_arguments(some, Objective(policy_gradient), [False, True, False, False, False])
    torch.library.opcheck(policy_loss_op, arguments, test_utils=OPCHECKS)
    weight, _ = random_nf4()
    frozen = some._replace(head=LMHead(weight._replace(dtype=torch.float32)))
    arguments = op_arguments(frozen, Objective(policy_gradient), [False] * 5)
    torch.library.opcheck(policy_loss_op, arguments)


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("trains", [True, False])
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(
    engine: str, dtype: torch.dtype, trains: bool
) -> None:
    case = make_case(1).to(dtype)
    if trains:
        case.leaves()
    real = run(case, engine=engine)
    with FakeTensorMode() as mode:

        def faked(tensor: Any) -> Any:
            return mode.from_tensor(tensor) if isinstance(tensor, Tensor) else tensor

        fields = {name: faked(x) for name, x in case._asdict().items() if name != "head"}
        head = LMHead(*(faked(x) for x in case.head))
        fake_case = case._replace(head=head, **fields)
        fake = run(fake_case, engine=engine)
        for value, expected in zip(fake, real, strict=True):
            assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
            assert value.requires_grad == expected.requires_grad
        if trains:
            fake_tensors = list(fake_case.tensors().values())
            for grad, tensor in zip(
                torch.autograd.grad(fake.loss, fake_tensors), case.leaves(), strict=True
            ):
                assert (grad.shape, grad.dtype) == (tensor.shape, tensor.dtype)


def call(case: Case, epsilon: float, temperature: float, engine: str) -> Tensor:
    """A loss whose length, bounds and temperature change from call to call."""
    return policy_loss(
        case.hidden_states * 2, case.head, case.target_ids, case.advantages, case.token_weights,
        objective=Objective(clipped_ratio, (epsilon, 2 * epsilon), (Regulariser(k3, 0.1),)),
        old_logps=case.old_logps, ref_logps=case.ref_logps, temperature=temperature,
        entropy_coef=0.1, engine=engine,
    ).loss  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_function_gives_the_same_bits(engine: str) -> None:
    torch._dynamo.reset()
    case = make_case(2).to(torch.float32)
    case.leaves()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for rows, epsilon, temperature in ((39, 0.2, 0.8), (17, 0.3, 0.8), (12, 0.1, 1.3)):
        arguments = (case.rows(slice(rows)), epsilon, temperature, engine)
        expected, value = call(*arguments), compiled(*arguments)
        assert torch.equal(value, expected)
        grads = torch.autograd.grad(value, case.leaves())
        for grad, other in zip(grads, torch.autograd.grad(expected, case.leaves()), strict=True):
            assert torch.equal(grad, other)


def test_a_compiled_function_follows_the_objective() -> None:
    torch._dynamo.reset()
    case = make_case(3).to(torch.float32)

    def loss(objective: Objective) -> Tensor:
        return run(case, objective=objective).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    objectives = (Objective(policy_gradient), OBJECTIVE, Objective(own_surrogate, (0.5,)))
    for objective in (*objectives, objectives[0]):
        assert torch.equal(compiled(objective), loss(objective))


def test_autocast_does_not_round_the_operands() -> None:
    for engine in ENGINES:
        case = make_case(4).to(torch.float32)
        expected, expected_grads = loss_and_gradients(case, engine=engine)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, grads = loss_and_gradients(case, engine=engine)
        for value, other in zip((*out, *grads), (*expected, *expected_grads), strict=True):
            assert torch.equal(value, other)


def own_surrogate(logp, old_logp, advantage, power):  # type: ignore[no-untyped-def]
    """A e^{power d} / power, d the log-ratio."""
    ratio = tl.exp(power * (logp - old_logp))
    return advantage * ratio / power, advantage * ratio


def own_penalty(logp, ref_logp):  # type: ignore[no-untyped-def]
    """delta^4 / 4"""
    delta = logp - ref_logp
    return 0.25 * delta * delta * delta * delta, delta * delta * delta


@pytest.mark.parametrize("engine", ENGINES)
def test_objective_of_the_callers_own(engine: str) -> None:
    case = make_case(5)
    objective = Objective(own_surrogate, (0.5,), (Regulariser(own_penalty, 0.2),))
    out, grads = loss_and_gradients(case, engine=engine, objective=objective, entropy_coef=0.0)
    leaves = case.leaves()
    kept = (case.target_ids >= 0) & (case.token_weights != 0)
    head, some = case.head, case.rows(kept)
    logits = some.hidden_states @ head.weight.T + head.bias  # type: ignore
    logits = logits + some.hidden_states @ head.lora_a.T @ head.lora_b.T  # type: ignore
    logps = (logits / 0.8).log_softmax(1).gather(1, some.target_ids[:, None])[:, 0]
    gain = some.advantages * ((logps - some.old_logps) / 2).exp() * 2 * some.rollout_weights
    penalty = (logps - some.ref_logps) ** 4 / 4
    loss = (some.token_weights * (0.2 * penalty - gain)).sum()
    torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-12)
    for grad, other in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-11)


def test_a_function_that_is_defined_again_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cell of a notebook is run twice."""
    module = ModuleType("cells")
    monkeypatch.setitem(sys.modules, "cells", module)
    case, losses = make_case(6), []
    for factor in ("1.0", "2.0"):
        source = "def f(logp, old_logp, advantage):\n    a = FACTOR * advantage\n"
        source += "    return a * logp, a + 0.0 * logp\n"
        exec(source.replace("FACTOR", factor), module.__dict__)
        out = run(case, objective=Objective(module.f), entropy_coef=0.0)
        losses.append(float(out.loss.detach()))
    assert losses[1] == pytest.approx(2 * losses[0])


@functools.wraps(importance_ratio)
def twice_the_ratio(logp, old_logp, advantage):  # type: ignore[no-untyped-def]
    """A function that goes by the name of another."""
    ratio = 2.0 * tl.exp(logp - old_logp)
    return ratio * advantage, ratio * advantage


def test_a_function_under_the_name_of_another_is_not_that_other() -> None:
    case = make_case(8)
    once = run(case, objective=Objective(importance_ratio), entropy_coef=0.0).loss
    try:
        twice = run(case, objective=Objective(twice_the_ratio), entropy_coef=0.0).loss
    except ValueError:
        return  # to refuse it is as good
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_in_another_dtype_than_the_weight(engine: str, dtype: torch.dtype) -> None:
    """PEFT keeps adapters in float32 on a half-precision model."""
    case = make_case(7).to(dtype)
    wide = {name: getattr(case.head, name).float() for name in ("bias", "lora_a", "lora_b")}
    mixed = case._replace(head=case.head._replace(**wide))
    exact = mixed.to(torch.float64)
    out, grads = loss_and_gradients(mixed, engine=engine, workspace_mb=0.3)
    truth, expected = loss_and_gradients(exact, engine=engine)
    torch.testing.assert_close(out.logps.double(), truth.logps, rtol=0, atol=1e-4)
    for name, grad, other in zip(TENSORS, grads, expected, strict=True):
        assert grad.dtype == mixed.tensors()[name].dtype
        error = (grad.double() - other).abs().max() / other.abs().max()
        assert error <= torch.finfo(grad.dtype).eps * (1 if grad.dtype == dtype else 100), name
