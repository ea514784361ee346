"""selected_logps beyond its numbers: memory that is given away, layouts, operators, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl_kernels import selected_logps
from fastrl_kernels.selected_logps import chunked, selected_logps_reference
from fastrl_kernels.selected_logps.op import (
    selected_logps_backward_op,
    selected_logps_inplace_backward_op,
    selected_logps_op,
)

S, V = 7, 23
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(S, V, generator=generator, dtype=torch.float64)).to(dtype)
    target_ids = torch.randint(0, V, (S,), generator=generator)
    target_ids[2] = -1
    return logits.requires_grad_(), target_ids


def loss_of(logits: Tensor, target_ids: Tensor, **settings: Any) -> Tensor:
    """Any weighting of the two outputs that have gradients."""
    out = selected_logps(logits, target_ids, **settings)
    weights = torch.linspace(-1, 1, len(logits), dtype=out.logps.dtype)
    return (weights * out.logps).sum() + 0.3 * out.entropies.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("buffer_values", [3 * V, 2**22])
def test_gradient_in_place_of_the_logits(
    dtype: torch.dtype, buffer_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "BUFFER_VALUES", buffer_values)
    leaf, target_ids = make_inputs(0, dtype)
    kept, lost = leaf * 1, leaf * 1
    before = kept.detach().clone()
    (expected,) = torch.autograd.grad(loss_of(kept, target_ids), leaf)
    assert torch.equal(kept, before)
    (grad,) = torch.autograd.grad(loss_of(lost, target_ids, inplace_backward=True), leaf)
    assert torch.equal(grad, expected)
    assert torch.equal(lost, expected)


def test_no_second_tensor_of_that_size() -> None:
    leaf, target_ids = make_inputs(1)
    logits = leaf * 1
    places: list[int] = []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    loss_of(logits, target_ids, inplace_backward=True).backward()
    assert places == [logits.data_ptr()]


def test_a_graph_that_still_needs_the_logits_notices() -> None:
    leaf, target_ids = make_inputs(2)
    loss = loss_of(leaf.tanh(), target_ids, inplace_backward=True)  # tanh keeps its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1
    loss = loss_of(logits, target_ids, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    first = loss_of(logits, target_ids)
    torch.autograd.grad(first, leaf, retain_graph=True)
    torch.autograd.grad(first, leaf)


def test_rows_that_share_memory_cannot_be_overwritten() -> None:
    leaf, target_ids = make_inputs(3)
    row = leaf[:1]
    (expected,) = torch.autograd.grad(loss_of(row.expand(S, V).clone(), target_ids), leaf)
    (grad,) = torch.autograd.grad(loss_of(row.expand(S, V), target_ids), leaf)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="single memory location"):
        loss_of(row.expand(S, V), target_ids, inplace_backward=True).backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("layout", ["last position left out", "transposed", "columns apart"])
def test_logits_that_are_not_contiguous(
    dtype: torch.dtype, inplace_backward: bool, layout: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    shape = {
        "last position left out": (S, 2 * V),
        "transposed": (V, S),
        "columns apart": (S, 2 * V),
    }
    leaf = torch.randn(shape[layout], generator=generator).to(dtype).requires_grad_()
    target_ids = make_inputs()[1]
    whole = leaf * 1
    logits = {
        "last position left out": lambda: whole.view(S, 2, V)[:, :-1].flatten(0, 1),
        "transposed": lambda: whole.T,
        "columns apart": lambda: whole[:, ::2],
    }[layout]()
    assert not logits.is_contiguous()
    assert logits.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    dense = logits.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(dense, target_ids), dense)
    out = selected_logps(logits, target_ids)
    for value, other in zip(out, selected_logps(dense, target_ids), strict=True):
        assert torch.equal(value, other)
    before = whole.detach().clone()
    loss = loss_of(logits, target_ids, inplace_backward=inplace_backward)
    (grad,) = torch.autograd.grad(loss, leaf)
    full = torch.zeros_like(whole)
    {
        "last position left out": lambda: full[:, :V],
        "transposed": lambda: full.T,
        "columns apart": lambda: full[:, ::2],
    }[layout]().copy_(expected)
    assert torch.equal(grad, full)
    if layout == "last position left out" and inplace_backward:  # and nothing but the logits
        assert torch.equal(whole[:, :V], expected)
        assert torch.equal(whole[:, V:], before[:, V:])
    else:
        assert torch.equal(whole, before)


def test_operators_pass_opcheck() -> None:
    logits, target_ids = make_inputs()
    temperatures = torch.full((S,), 0.7)
    torch.library.opcheck(selected_logps_op, (logits, target_ids, temperatures, False, "torch"))
    statistics = tuple(torch.ones(S) for _ in range(6))
    plain = logits.detach()
    inputs = (target_ids, temperatures, "torch")
    torch.library.opcheck(
        selected_logps_backward_op, (torch.empty(S, V), *statistics, plain, *inputs)
    )
    torch.library.opcheck(
        selected_logps_backward_op, (torch.empty(S, V), statistics[0], None, *statistics[:4], plain,
                                     *inputs),
    )  # fmt: skip
    torch.library.opcheck(selected_logps_inplace_backward_op, (plain.clone(), *statistics, *inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(dtype: torch.dtype) -> None:
    logits, target_ids = make_inputs(0, dtype)
    real = selected_logps(logits, target_ids, temperature=0.7)
    with FakeTensorMode() as mode:
        fake_logits = mode.from_tensor(logits)
        fake = selected_logps(fake_logits, mode.from_tensor(target_ids), temperature=0.7)
        (grad,) = torch.autograd.grad(fake.logps.sum(), fake_logits)
    for value, expected in zip(fake, real, strict=True):
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
        assert value.requires_grad == expected.requires_grad
    assert (grad.shape, grad.dtype) == (logits.shape, dtype)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiled_function_gives_the_same_bits(inplace_backward: bool) -> None:
    torch._dynamo.reset()
    leaf, target_ids = make_inputs()

    def loss(leaf: Tensor, target_ids: Tensor, temperature: float) -> Tensor:
        settings = {"temperature": temperature, "inplace_backward": inplace_backward}
        return loss_of(leaf * 2, target_ids, **settings)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for rows, temperature in ((7, 0.7), (5, 0.9), (4, 1.3)):
        arguments = (leaf[:rows], target_ids[:rows], temperature)
        expected, value = loss(*arguments), compiled(*arguments)
        assert torch.equal(value, expected)
        (grad,) = torch.autograd.grad(value, leaf)
        assert torch.equal(grad, torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("buffer_values", [1, 2 * V, 2**22])
def test_row_alone_and_in_a_batch_and_every_time(
    dtype: torch.dtype, buffer_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "BUFFER_VALUES", buffer_values)
    logits, target_ids = make_inputs(5, dtype)

    def results(rows: list[int]) -> list[Tensor]:
        some = logits[rows].detach().requires_grad_()
        out = selected_logps(some, target_ids[rows])
        (grad,) = torch.autograd.grad(out.logps.sum() + 0.1 * out.entropies.sum(), some)
        return [*out, grad]

    together = results(list(range(S)))
    for rows in (list(range(S)), [0], [2], [S - 1, 3], [4, 4]):
        for alone, batch in zip(results(rows), together, strict=True):
            assert torch.equal(alone, batch[rows])


def test_values_without_gradients() -> None:
    logits, target_ids = make_inputs(6)
    expected = selected_logps(logits, target_ids)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = selected_logps(logits, target_ids)
        assert not any(value.requires_grad for value in out)
        for value, other in zip(out, expected, strict=True):
            assert torch.equal(value.clone(), other.detach())


def test_one_column_is_certain() -> None:
    logits = torch.linspace(-9, 9, S)[:, None].requires_grad_()
    out = selected_logps(logits, torch.zeros(S, dtype=torch.int64))
    for value in (out.logps, out.entropies, torch.autograd.grad(out.logps.sum(), logits)[0]):
        assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(out.lse, logits[:, 0].detach())


def test_the_first_of_equal_logits_is_the_most_likely() -> None:
    logits, target_ids = torch.zeros(S, V), torch.arange(S)
    logits[:, 5] = logits[:, 11] = 1.0
    out = selected_logps(logits, target_ids)
    assert torch.equal(out.argmax_ids, selected_logps_reference(logits, target_ids).argmax_ids)
    assert out.argmax_ids.tolist() == [5] * S


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(S)}, "logits"),
        ({"logits": torch.zeros(2, S, V)}, "logits"),
        ({"logits": torch.zeros(S, V, dtype=torch.int64)}, "logits"),
        ({"logits": torch.zeros(S, 0)}, "at least one column"),
        ({"logits": torch.zeros(S, V, device="meta")}, "move target_ids"),
        ({"target_ids": torch.zeros(S)}, "target_ids"),
        ({"target_ids": torch.zeros(S - 1, dtype=torch.int64)}, "target_ids"),
        ({"target_ids": torch.zeros(S, 1, dtype=torch.int64)}, "target_ids"),
        ({"target_ids": torch.full((S,), V)}, "vocabulary size"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -2.0}, "temperature"),
        ({"temperature": torch.ones(S + 1)}, "temperature"),
        ({"temperature": torch.zeros(S)}, "temperature"),
        ({"temperature": torch.ones(S, requires_grad=True)}, "temperature"),
        ({"implementation": "triton"}, '"torch"'),
        ({"implementation": "fast"}, "implementation"),
    ],
)
def test_bad_arguments_raise(change: dict[str, Any], message: str) -> None:
    logits, target_ids = make_inputs()
    with pytest.raises(ValueError, match=message):
        selected_logps(**{"logits": logits, "target_ids": target_ids, **change})


def test_check_says_what_is_not_finite() -> None:
    logits, target_ids = make_inputs()
    out = selected_logps(logits, target_ids, check=True)
    assert torch.equal(out.logps, selected_logps(logits, target_ids).logps)
    broken = logits.detach().clone()
    broken[2] = torch.nan  # ignored
    selected_logps(broken, target_ids, check=True)
    broken[3, 4] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        selected_logps(broken, target_ids, check=True)
