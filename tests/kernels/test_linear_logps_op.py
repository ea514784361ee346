"""linear_logps as an operator: fake tensors, torch.compile, autocast, frozen heads."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl_kernels import LMHead, linear_logps
from fastrl_kernels.head_arguments import NUM_TENSORS, to_arguments
from fastrl_kernels.linear_logps.op import head_gradients_op, linear_logps_op

S, D, V = 7, 5, 23


def make_inputs(seed: int = 0) -> tuple[Tensor, LMHead, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    head = LMHead(normal(V, D), normal(V), normal(2, D), normal(V, 2), softcap=3.0, vocab_size=19)
    target_ids = torch.randint(0, 19, (S,), generator=generator)
    target_ids[2] = -1
    return normal(S, D), head, target_ids


def op_arguments(hidden: Tensor, head: LMHead, target_ids: Tensor) -> tuple[Any, ...]:
    arguments = to_arguments(head)
    temperatures = torch.full((S,), 0.7)
    tensors = (hidden, *arguments[:NUM_TENSORS], target_ids, temperatures)
    return (*tensors, *arguments[NUM_TENSORS:], 1.0, False)


def test_operators_pass_opcheck() -> None:
    hidden, head, target_ids = make_inputs()
    arguments = op_arguments(hidden, head, target_ids)
    torch.library.opcheck(linear_logps_op, (*arguments, False, "torch"))
    plain = op_arguments(hidden, LMHead(head.weight), target_ids)
    torch.library.opcheck(linear_logps_op, (*plain, False, "torch"))
    slopes = [torch.ones(S) for _ in range(6)]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    for into in (None, torch.zeros(V, D)):
        for needs_grad in ([True] * 5, [True, False, False, True, True]):
            inputs = (into, *slopes, *detached, "torch", needs_grad)
            torch.library.opcheck(head_gradients_op, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(dtype: torch.dtype) -> None:
    hidden, head, target_ids = make_inputs()
    head = head._replace(**{name: getattr(head, name).to(dtype) for name in LMHead._fields[:4]})
    real = linear_logps(hidden.to(dtype), head, target_ids, temperature=0.7)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) for x in (hidden.to(dtype), *head[:4], target_ids)]
    with mode:
        fake_head = head._replace(**dict(zip(LMHead._fields[:4], fakes[1:5], strict=True)))
        fake = linear_logps(fakes[0], fake_head, fakes[5], temperature=0.7)
    for value, expected in zip(fake, real, strict=True):
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
        assert value.requires_grad == expected.requires_grad


def test_compiled_function_gives_the_same_bits() -> None:
    hidden, head, target_ids = make_inputs()
    tensors = [hidden, *head[:4]]

    def loss(hidden: Tensor, target_ids: Tensor, temperature: float) -> Tensor:
        out = linear_logps(hidden * 2, head, target_ids, temperature=temperature)
        return out.logps.sum() + 0.3 * out.entropies.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for rows, temperature in ((7, 0.7), (5, 0.9), (4, 1.3)):
        arguments = (hidden[:rows], target_ids[:rows], temperature)
        expected, value = loss(*arguments), compiled(*arguments)
        assert torch.equal(value, expected)
        grads = torch.autograd.grad(value, tensors)
        for grad, other in zip(grads, torch.autograd.grad(expected, tensors), strict=True):
            assert torch.equal(grad, other)


def test_autocast_does_not_round_the_operands() -> None:
    hidden, head, target_ids = make_inputs()
    expected = linear_logps(hidden, head, target_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logps(hidden, head, target_ids)
        grad = torch.autograd.grad(out.logps.sum(), hidden)
    assert torch.equal(out.logps, expected.logps)
    assert torch.equal(grad[0], torch.autograd.grad(expected.logps.sum(), hidden)[0])


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "lora_a", "lora_b"])
def test_each_gradient_alone_equals_all_together(trained: str) -> None:
    hidden, head, target_ids = make_inputs()
    tensors = dict(zip(("hidden", *LMHead._fields), (hidden, *head[:4]), strict=False))
    everything = torch.autograd.grad(
        linear_logps(hidden, head, target_ids).logps.sum(), list(tensors.values())
    )
    expected = dict(zip(tensors, everything, strict=True))[trained]
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    linear_logps(hidden, head, target_ids).logps.sum().backward()
    for name, tensor in tensors.items():
        if name == trained:
            assert torch.equal(tensor.grad, expected)
        else:
            assert tensor.grad is None


def test_only_logps_and_entropies_are_differentiable() -> None:
    out = linear_logps(*make_inputs())
    assert [value.requires_grad for value in out] == [True, True, False, False, False, False]
    with torch.no_grad():
        assert not any(value.requires_grad for value in linear_logps(*make_inputs()))


def test_plain_weight_is_a_head_without_the_rest() -> None:
    hidden, head, target_ids = make_inputs()
    for value, other in zip(
        linear_logps(hidden, head.weight, target_ids),
        linear_logps(hidden, LMHead(head.weight), target_ids),
        strict=True,
    ):
        assert torch.equal(value, other)
