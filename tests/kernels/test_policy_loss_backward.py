"""How gradients of policy_loss leave it: accumulation, scaling, who asks, and how often."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastrl_kernels.policy_loss import policy_loss_reference
from tests.kernels.policy_cases import (
    ENGINES,
    SMALL,
    TENSORS,
    Case,
    S,
    V,
    loss_and_gradients,
    make_case,
    run,
    transcribe,
)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and refuse operations without a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)


COMBINATIONS = [c for c in itertools.product([True, False], repeat=5) if any(c)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_gradient_alone_has_the_bits_it_has_among_all(
    engine: str, dtype: torch.dtype
) -> None:
    """The products of one gradient do not depend on which others there are.

    Half-precision sums take room in the workspace, which is large enough here for one chunk always.
    """
    case = make_case(0, lora_scale=0.7, softcap=9.0).to(dtype)
    _, grads = loss_and_gradients(case, engine=engine)
    everything = dict(zip(TENSORS, grads, strict=True))
    for wanted in COMBINATIONS:
        for (_, tensor), is_wanted in zip(case.tensors().items(), wanted, strict=True):
            tensor.grad = None
            tensor.requires_grad_(is_wanted)
        run(case, engine=engine).loss.backward()
        for (name, tensor), is_wanted in zip(case.tensors().items(), wanted, strict=True):
            if not is_wanted:
                assert tensor.grad is None
            else:
                assert torch.equal(tensor.grad, everything[name]), wanted


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trained", TENSORS)
def test_autograd_may_ask_for_one_gradient(engine: str, trained: str) -> None:
    case = make_case(1)
    _, grads = loss_and_gradients(case, engine=engine)
    expected = dict(zip(TENSORS, grads, strict=True))[trained]
    (grad,) = torch.autograd.grad(run(case, engine=engine).loss, case.tensors()[trained])
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workspace_mb", [SMALL, 256])
def test_two_calls_add_up(engine: str, workspace_mb: float) -> None:
    first, second = make_case(2), make_case(3)
    second = second._replace(head=first.head)
    _, first_grads = loss_and_gradients(first, engine=engine, workspace_mb=workspace_mb)
    _, second_grads = loss_and_gradients(second, engine=engine, workspace_mb=workspace_mb)
    for case in (first, second):
        run(case, engine=engine, workspace_mb=workspace_mb).loss.backward()
    assert torch.equal(first.hidden_states.grad, first_grads[0])
    assert torch.equal(second.hidden_states.grad, second_grads[0])
    for tensor, one, other in zip(first.head, first_grads[1:], second_grads[1:], strict=False):
        assert torch.equal(tensor.grad, one + other)
    both = (run(case, engine=engine, workspace_mb=workspace_mb).loss for case in (first, second))
    together = torch.autograd.grad(sum(both), first.leaves()[1:])
    for tensor, grad in zip(first.head, together, strict=False):
        close(grad, tensor.grad)


SCALES: list[Callable[[Tensor], Tensor]] = [
    lambda loss: loss / 4, lambda loss: -3 * loss, lambda loss: loss.exp(), lambda loss: loss * 0,
]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", SCALES)
def test_what_is_done_to_the_loss_is_done_to_the_gradients(
    engine: str, scale: Callable[[Tensor], Tensor]
) -> None:
    case = make_case(4)
    loss, grads = loss_and_gradients(case, engine=engine)
    point = loss.loss.detach().requires_grad_()
    (factor,) = torch.autograd.grad(scale(point), point)
    scaled = torch.autograd.grad(scale(run(case, engine=engine).loss), case.leaves())
    for grad, unscaled in zip(scaled, grads, strict=True):
        close(grad, factor * unscaled)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_nothing_is_asked_of(engine: str) -> None:
    """Other losses of a sum may have a gradient where this one has none."""
    case = make_case(5)
    case.leaves()
    out = run(case, engine=engine)
    (grad,) = torch.autograd.grad(case.hidden_states.sum(), case.hidden_states)
    assert torch.equal(grad, torch.ones_like(grad))
    assert out.loss.grad_fn is not None
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.slopes.sum().backward()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", ["none", "zero", "something", "removed"])
def test_accumulate_grad_equals_autograd(engine: str, dtype: torch.dtype, state: str) -> None:
    case = make_case(6, vocab_size=V - 6).to(dtype)
    leaves, weight = case.leaves(), case.tensors()["weight"]
    settings: dict[str, Any] = {"engine": engine, "workspace_mb": 2 * SMALL}
    grads = torch.autograd.grad(run(case, **settings).loss / 4, leaves)
    before = torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight).to(dtype)
    if state in ("none", "zero"):
        before.zero_()
    if state != "none":
        weight.grad = before.clone()
    out = run(case, accumulate_grad=True, **settings)
    if state == "removed":
        torch.optim.SGD([weight]).zero_grad(set_to_none=True)
        before.zero_()
    kept = weight.grad
    (out.loss / 4).backward()
    assert kept is None or kept is weight.grad
    assert weight.grad.dtype == dtype
    expected = before.double() + grads[1].double()
    # Autograd rounds the gradient and then the sum, accumulate_grad rounds only the sum in half
    # precision; wider sums of S rows begin from what is there already.
    roundings = 2 if dtype.itemsize == 2 else S
    tolerance = float(roundings * torch.finfo(dtype).eps * expected.abs().max())
    torch.testing.assert_close(weight.grad.double(), expected, rtol=0, atol=tolerance)
    for tensor, grad in zip(leaves, grads, strict=True):
        assert tensor is weight or torch.equal(tensor.grad, grad)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_accumulated_sums_are_rounded_once_a_call(engine: str, dtype: torch.dtype) -> None:
    """Eight calls into one .grad err as autograd's own eight additions do."""
    case = make_case(7).to(dtype)
    wide = make_case(7).to(dtype).to(torch.float64)
    truth = loss_and_gradients(wide, function=policy_loss_reference)[1][1]
    errors = []
    for accumulate_grad in (True, False):
        case.head.weight.grad = None  # type: ignore[union-attr]
        case.leaves()
        for _ in range(8):
            out = run(case, engine=engine, workspace_mb=SMALL * 2, accumulate_grad=accumulate_grad)
            out.loss.backward()
        errors.append((case.head.weight.grad.double() - 8 * truth).abs().max())  # type: ignore
    assert errors[0] <= 2 * errors[1] + 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("accumulate_grad", [False, True])
def test_tied_embedding(engine: str, accumulate_grad: bool) -> None:
    """One parameter is embedding and head; its two gradients meet in .grad, in any order."""
    case = make_case(8, bias=None, lora_a=None, lora_b=None)
    weight = nn.Parameter(case.head.weight.detach().clone())  # type: ignore[union-attr]
    ids = torch.randint(0, V, (S,), generator=torch.Generator().manual_seed(8))

    def tied() -> Case:
        hidden_states = nn.functional.embedding(ids, weight).tanh()
        return case._replace(hidden_states=hidden_states, head=case.head._replace(weight=weight))

    logps = transcribe(tied())["logps"].detach()
    case = case._replace(old_logps=logps + 0.1, ref_logps=logps - 0.1)
    transcribe(tied())["loss"].backward()
    expected = weight.grad
    for num_calls in (1, 2):
        weight.grad = None
        for _ in range(num_calls):
            run(tied(), engine=engine, accumulate_grad=accumulate_grad).loss.backward()
        close(weight.grad, num_calls * expected)


@pytest.mark.parametrize("accumulate_grad", [False, True])
def test_one_pass_refuses_a_second_backward(accumulate_grad: bool) -> None:
    case = make_case(9)
    case.leaves()
    out = run(case, engine="one_pass", accumulate_grad=accumulate_grad)
    out.loss.backward(retain_graph=True)
    grads = [tensor.grad.clone() for tensor in case.leaves()]
    with pytest.raises(RuntimeError, match='"min_memory"'):
        out.loss.backward()
    for tensor, grad in zip(case.leaves(), grads, strict=True):
        assert torch.equal(tensor.grad, grad)


def test_min_memory_allows_a_second_backward() -> None:
    case = make_case(9)
    leaves = case.leaves()
    out = run(case, engine="min_memory")
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    for grad, other in zip(torch.autograd.grad(out.loss, leaves), first, strict=True):
        assert torch.equal(grad, other)


def test_min_memory_allows_a_second_backward_of_the_adapter_alone() -> None:
    case = make_case(9)
    adapter = [case.head.lora_a.requires_grad_(), case.head.lora_b.requires_grad_()]  # type: ignore
    out = run(case, engine="min_memory")
    first = torch.autograd.grad(out.loss, adapter, retain_graph=True)
    for grad, other in zip(torch.autograd.grad(out.loss, adapter), first, strict=True):
        assert torch.equal(grad, other)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_without_gradients(engine: str, mode: Callable[[], Any]) -> None:
    case = make_case(10)
    expected, _ = loss_and_gradients(case, engine=engine, workspace_mb=SMALL)
    with mode():
        out = run(case, engine=engine, workspace_mb=SMALL)
    assert not any(value.requires_grad for value in out)
    for value, other in zip(out, expected, strict=True):
        close(value.clone(), other.detach())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("accumulate_grad", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_activation_checkpointing(
    engine: str, accumulate_grad: bool, use_reentrant: bool
) -> None:
    case = make_case(11)
    _, grads = loss_and_gradients(case, engine=engine)

    def loss(hidden_states: Tensor) -> Tensor:
        inner = case._replace(hidden_states=hidden_states)
        return run(inner, engine=engine, accumulate_grad=accumulate_grad).loss

    checkpoint(loss, case.hidden_states, use_reentrant=use_reentrant).backward()
    for tensor, grad in zip(case.leaves(), grads, strict=True):
        close(tensor.grad, grad)


def test_no_call_changes_what_it_was_given() -> None:
    case = make_case(12)
    before = [x.clone() for x in (*case, *case.head[:4]) if isinstance(x, Tensor)]
    for engine in ENGINES:
        loss_and_gradients(case, engine=engine, workspace_mb=SMALL)
    after = [x.detach() for x in (*case, *case.head[:4]) if isinstance(x, Tensor)]
    for value, other in zip(after, before, strict=True):
        assert torch.equal(value, other)
