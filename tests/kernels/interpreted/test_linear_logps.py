"""linear_logps: every feature of a head in every dtype, odd sizes and layouts, against float64."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastrl_kernels import LinearLogps, LMHead, linear_logps
from fastrl_kernels.linear_logps import launch, launch_backward, linear_logps_reference
from tests.kernels.interpreted.conftest import (
    DTYPES,
    HEADS,
    TRAINABLE,
    Case,
    check_gradients,
    check_statistics,
    check_values,
    cleaned,
    make_case,
    naive_logps,
    sets_of_trained_tensors,
    trainable,
    trained,
)

triton_logps = functools.partial(linear_logps, implementation="triton")


def check_linear_logps(case: Case, function: Callable[..., LinearLogps], *, seed: int = 9) -> None:
    """Statistics, and gradients of a random weighting of logps and entropies, against float64."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randn(2, case.hidden.shape[0], generator=generator)

    def run(inputs: Case, compute: Callable[..., LinearLogps]) -> tuple[LinearLogps, Any]:
        inputs, tensors = trained(inputs, trainable(case))
        out = compute(*inputs[:3], temperature=inputs.temperature)
        weights = slopes.to(out.logps.dtype).unbind()
        return out, torch.autograd.grad((out.logps, out.entropies), tensors, weights)

    truth, expected = run(cleaned(case, torch.float64), linear_logps_reference)
    out, gradients = run(case, function)
    _, naive = run(cleaned(case), naive_logps)
    check_statistics(out, truth)
    check_gradients(gradients, naive, expected)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(HEADS, DTYPES[:2]),
        *itertools.product(("plain", "everything", "up", "down", "peaked"), DTYPES[2:]),
    ],
)
def test_every_head(name: str, dtype: torch.dtype) -> None:
    check_linear_logps(make_case(name, dtype), triton_logps)


@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [(0, 19, 203), (1, 1, 5), (7, 33, 31), (37, 5, 97), (5, 16, 96), (3, 2, 1), (4, 17, 203)],
)
def test_sizes_around_the_blocks_and_splits(rows: int, width: int, columns: int) -> None:
    check_linear_logps(
        make_case("plain", torch.float32, rows=rows, width=width, columns=columns), triton_logps
    )


def strided(case: Case) -> Case:
    """The same values, with the elements of every tensor apart in memory."""

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        wider = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7, dtype=tensor.dtype)
        wider[..., ::2] = tensor
        return wider[..., ::2]

    head = [x.T.contiguous().T if isinstance(x, torch.Tensor) else x for x in case.head]
    temperature = case.temperature
    assert isinstance(temperature, torch.Tensor)
    return Case(apart(case.hidden), LMHead._make(head), apart(case.target_ids), apart(temperature))


def rows_apart(case: Case) -> Case:
    """The same values in rows of wider tensors."""

    def apart(tensor: object) -> object:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
            return tensor
        return torch.nn.functional.pad(tensor, (3, 5), value=torch.nan)[:, 3:-5]

    return case._replace(hidden=apart(case.hidden), head=LMHead._make(map(apart, case.head)))


@pytest.mark.parametrize("layout", [strided, rows_apart])
def test_layouts(layout) -> None:  # type: ignore[no-untyped-def]
    check_linear_logps(layout(make_case("everything", torch.float32)), triton_logps)


@pytest.mark.parametrize("name", ["logps", "entropies"])
def test_gradients_of_a_plain_sum(name: str) -> None:
    """Its gradient is one number for all rows, in memory too."""
    case, tensors = trained(make_case("plain", torch.float32))
    wide, wide_tensors = trained(cleaned(case, torch.float64))
    got = torch.autograd.grad(getattr(triton_logps(*case[:3]), name).sum(), tensors)
    out = linear_logps_reference(*wide[:3])
    expected = torch.autograd.grad(getattr(out, name).sum(), wide_tensors)
    for grad, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slopes_of_ignored_rows_do_not_matter(dtype: torch.dtype) -> None:
    case, tensors = trained(make_case("plain", dtype))
    slopes = torch.randn(case.target_ids.shape[0], generator=torch.Generator().manual_seed(1))

    def gradients(value: float) -> tuple[torch.Tensor, ...]:
        weights = torch.where(case.target_ids < 0, value, slopes)
        return torch.autograd.grad(triton_logps(*case[:3]).logps, tensors, weights)

    for value in (1e30, torch.nan):
        for got, expected in zip(gradients(value), gradients(0.0), strict=True):
            assert torch.equal(got, expected)


def test_rows_without_a_slope_do_not_matter() -> None:
    """Their hidden states are NaN here; they must not be multiplied with zeros."""
    case, tensors = trained(make_case("everything", torch.float32))
    slopes = torch.ones(case.target_ids.shape[0])
    slopes[::2] = 0
    with torch.no_grad():
        tensors[0][::2] = torch.nan
    wide, wide_tensors = trained(cleaned(case, torch.float64))
    got = torch.autograd.grad(
        triton_logps(*case[:3], temperature=case.temperature).logps, tensors, slopes
    )
    out = linear_logps_reference(*wide[:3], temperature=wide.temperature)
    expected = torch.autograd.grad(out.logps, wide_tensors, slopes.double())
    assert not got[0][::2].any()
    for grad, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-6)


def test_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public plan refuses workspaces that hold so few rows, so a MiB is made smaller here."""
    monkeypatch.setattr(launch, "MIB", 2**8)
    monkeypatch.setattr(launch_backward, "MIB", 2**8)
    case = make_case("everything", torch.bfloat16)
    check_linear_logps(case, functools.partial(triton_logps, workspace_mb=8))


def test_every_set_of_trained_tensors() -> None:
    case = make_case("everything", torch.float32, rows=3, width=7, columns=29)
    wide, wide_tensors = trained(cleaned(case, torch.float64))
    out = linear_logps_reference(*wide[:3], temperature=wide.temperature)
    truth = dict(zip(TRAINABLE, torch.autograd.grad(out.logps.sum(), wide_tensors), strict=True))
    for names in sets_of_trained_tensors()[1:]:
        some, tensors = trained(case, names)
        logps = triton_logps(*some[:3], temperature=some.temperature).logps
        for name, grad in zip(
            names, torch.autograd.grad(logps, tensors, torch.ones(3)), strict=True
        ):
            torch.testing.assert_close(grad.double(), truth[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_accumulation_into_the_weights_gradient(dtype: torch.dtype, transposed: bool) -> None:
    case = make_case("plain", dtype)
    if transposed:
        assert isinstance(case.head.weight, torch.Tensor)
        case = case._replace(head=LMHead(case.head.weight.T.contiguous().T))
    case, (_, weight) = trained(case)
    logps = triton_logps(*case[:3], accumulate_grad=True).logps
    weight.grad = torch.ones_like(weight)
    slopes = torch.linspace(-1, 1, logps.shape[0])
    (logps * slopes).sum().backward()
    wide, (_, wide_weight) = trained(cleaned(case, torch.float64))
    truth = torch.autograd.grad(
        linear_logps_reference(*wide[:3]).logps, wide_weight, slopes.double()
    )
    check_gradients([weight.grad], [(truth[0] + 1).to(dtype)], [truth[0] + 1])


def test_tiny_slopes_in_float16() -> None:
    """1e-5 times a probability is below what float16 holds."""
    case, tensors = trained(make_case("everything", torch.float16))
    out = triton_logps(*case[:3], temperature=case.temperature)
    ones = torch.ones_like(out.logps)
    small = torch.autograd.grad(out.logps, tensors, ones * 2**-17, retain_graph=True)
    large = torch.autograd.grad(out.logps, tensors, ones)
    for got, expected in zip(small, large, strict=True):
        torch.testing.assert_close(got.double() * 2**17, expected.double(), rtol=0.01, atol=0.01)


def test_no_gradient_of_anything() -> None:
    case = make_case("plain", torch.float32)
    out = triton_logps(*case[:3])
    assert not out.logps.requires_grad
    check_values(out.lse, linear_logps_reference(*cleaned(case, torch.float64)[:3]).lse)
