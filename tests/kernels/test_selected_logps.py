"""selected_logps against its formulas and against linear_logps; truth is float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import LinearLogps, linear_logps, selected_logps
from fastrl_kernels.selected_logps import chunked, selected_logps_reference

S, V = 37, 123
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and refuse operations without a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_inputs(seed: int, num_rows: int = S) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (some ignored) and one temperature a row."""
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * normal(generator, num_rows, V)
    target_ids = torch.randint(0, V, (num_rows,), generator=generator)
    target_ids[2::5] = -1 - torch.arange(len(target_ids[2::5])) * 33
    return logits, target_ids, torch.linspace(0.5, 2, num_rows, dtype=torch.float64)


def slopes(seed: int, num_rows: int = S) -> tuple[Tensor, Tensor]:
    first, second = normal(torch.Generator().manual_seed(seed), 2, num_rows)
    return first, second


def gradient(out: LinearLogps, logits: Tensor, seed: int = 9) -> Tensor:
    """Gradient of a random weighting of logps and entropies."""
    weights = [x.to(out.logps.dtype) for x in slopes(seed, logits.shape[0])]
    return torch.autograd.grad((out.logps, out.entropies), logits, weights)[0]


def transcribe(logits: Tensor, target_ids: Tensor, temperature: float | Tensor) -> LinearLogps:
    """Every field from the formulas; rows are given one by one, ignored ones left at zero."""
    fields = LinearLogps._make([torch.zeros(len(logits), dtype=logits.dtype) for _ in range(5)] + [
        torch.zeros(len(logits), dtype=torch.int64)
    ])  # fmt: skip
    for row, target in enumerate(target_ids.tolist()):
        if target < 0:
            continue
        factor = temperature[row] if isinstance(temperature, Tensor) else temperature
        z = logits[row] / factor
        lse = z.max().detach() + (z - z.max().detach()).exp().sum().log()
        p = (z - lse).exp()
        values = (z[target] - lse, (p * (lse - z)).sum(), lse, p.pow(2).sum(), p.pow(3).sum())
        for field, value in zip(fields, values, strict=False):
            field[row] = value
        fields.argmax_ids[row] = z.argmax()
    return fields


def close(value: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)


def small_buffer(monkeypatch: pytest.MonkeyPatch, num_values: int) -> None:
    """A few rows a chunk; below one row of logits it is one."""
    monkeypatch.setattr(chunked, "BUFFER_VALUES", num_values)
    monkeypatch.setattr(chunked, "COLUMNS", 50)


@pytest.mark.parametrize("buffer_values", [1, 5 * V, 2**22])
@pytest.mark.parametrize("num_rows", [0, 1, 7, S, 257])
@pytest.mark.parametrize("per_token", [True, False])
def test_values_and_gradients(
    buffer_values: int, num_rows: int, per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_buffer(monkeypatch, buffer_values)
    logits, target_ids, temperatures = make_inputs(0, num_rows)
    temperature = temperatures if per_token else 0.7
    logits.requires_grad_()
    truth = transcribe(logits, target_ids, temperature)
    expected = gradient(truth, logits) if num_rows else torch.zeros_like(logits)
    for function in (selected_logps, selected_logps_reference):
        out = function(logits, target_ids, temperature=temperature)
        for value, other in zip(out, truth, strict=True):
            close(value, other.detach(), 1e-11)
        close(gradient(out, logits), expected, 1e-11)
        assert [x.requires_grad for x in out] == [True, True] + [False] * 4


@pytest.mark.parametrize("trained", ["logps", "entropies"])
def test_gradient_of_one_output(trained: str) -> None:
    logits, target_ids, _ = make_inputs(1)
    logits.requires_grad_()
    grads = []
    for function in (selected_logps, selected_logps_reference):
        value = getattr(function(logits, target_ids, temperature=0.7), trained)
        grads.append(torch.autograd.grad((value * slopes(1)[0]).sum(), logits)[0])
    close(*grads)
    rows = logits[:3].detach().requires_grad_()

    def value_of(rows: Tensor) -> Tensor:
        return getattr(selected_logps(rows, target_ids[:3], temperature=0.7), trained)  # type: ignore

    assert torch.autograd.gradcheck(value_of, rows, fast_mode=True)


def test_equal_to_linear_logps_on_the_same_logits() -> None:
    logits, target_ids, temperatures = make_inputs(2)
    hidden, leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    identity = torch.eye(V, dtype=torch.float64)
    linear = linear_logps(hidden, identity, target_ids, temperature=temperatures)
    selected = selected_logps(leaf, target_ids, temperature=temperatures)
    for value, other in zip(selected, linear, strict=True):
        close(value.detach(), other.detach())
    close(gradient(selected, leaf), gradient(linear, hidden))


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("shift", "peak"), [(0, 0), (30, 0), (-30, 0), (0, 18), (30, 9)])
def test_low_precision_against_float64(
    dtype: torch.dtype, inplace_backward: bool, shift: float, peak: float,
) -> None:  # fmt: skip
    """Values within the contract, gradients three times what PyTorch errs in the same dtype."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * normal(generator, S, 1501) + shift
    logits[:, 700] += peak
    target_ids = torch.randint(0, 1501, (S,), generator=generator)
    target_ids[::3] = 700
    target_ids[::7] = -1
    logits = logits.to(dtype)
    wide = logits.double().requires_grad_()
    truth = selected_logps_reference(wide, target_ids)
    same = logits.clone().requires_grad_()
    naive = gradient(selected_logps_reference(same, target_ids), same)
    ours = logits.clone().requires_grad_()
    out = selected_logps(ours * 1, target_ids, inplace_backward=inplace_backward)
    for name in ("logps", "entropies", "lse", "sum_p2", "sum_p3"):
        error = (getattr(out, name) - getattr(truth, name)).abs()
        assert error.median() <= 1e-5, name
        assert error.max() <= 1e-4, name
    grad, exact = gradient(out, ours), gradient(truth, wide)
    assert grad.dtype == dtype
    error, allowed = (grad - exact).abs().max(), 3 * (naive - exact).abs().max()
    assert error <= allowed


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_minus_infinity_are_columns_that_are_not_there(
    dtype: torch.dtype, inplace_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_buffer(monkeypatch, 5 * V)
    logits, target_ids, temperatures = make_inputs(5)
    kept = torch.arange(0, V, 3)
    target_ids = torch.where(target_ids < 0, target_ids, target_ids // 3 * 3)
    masked = torch.full((S, V), -torch.inf, dtype=dtype)
    masked[:, kept] = logits[:, kept].to(dtype)
    masked.requires_grad_()
    few = masked.detach()[:, kept].requires_grad_()
    settings: dict[str, Any] = {"temperature": temperatures, "inplace_backward": inplace_backward}
    out = selected_logps(masked * 1, target_ids, **settings)
    few_ids = torch.where(target_ids < 0, target_ids, target_ids // 3)
    expected = selected_logps(few * 1, few_ids, **settings)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for name in ("logps", "entropies", "lse", "sum_p2", "sum_p3"):
        close(getattr(out, name).detach(), getattr(expected, name).detach(), tolerance)
    assert torch.equal(out.argmax_ids, 3 * expected.argmax_ids)
    grad, few_grad = gradient(out, masked), gradient(expected, few)
    ulp = float(torch.finfo(dtype).eps * few_grad.abs().max())
    close(grad[:, kept], few_grad, max(ulp, tolerance))
    others = torch.ones(V, dtype=torch.bool).index_fill(0, kept, False)
    assert torch.equal(grad[:, others], torch.zeros_like(grad[:, others]))


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, -torch.inf])
def test_ignored_rows_are_zero_and_harmless(inplace_backward: bool, filling: float) -> None:
    logits, target_ids, temperatures = make_inputs(6)
    ignored = target_ids < 0
    logits[ignored] = filling
    logits.requires_grad_()
    settings: dict[str, Any] = {"inplace_backward": inplace_backward}
    out = selected_logps(logits * 1, target_ids, temperature=temperatures, **settings)
    for value in out:
        assert torch.equal(value[ignored], torch.zeros_like(value[ignored]))
    grad = gradient(out, logits)
    assert torch.equal(grad[ignored], torch.zeros_like(grad[ignored]))
    rows = logits.detach()[~ignored].requires_grad_()
    truth = transcribe(rows, target_ids[~ignored], temperatures[~ignored])
    weights = [x[~ignored] for x in slopes(9)]
    (expected,) = torch.autograd.grad((truth.logps, truth.entropies), rows, weights)
    close(out.logps[~ignored], truth.logps, 1e-11)
    close(grad[~ignored], expected, 1e-11)


def test_all_rows_ignored() -> None:
    logits = torch.full((S, V), torch.nan, requires_grad=True)
    out = selected_logps(logits, torch.full((S,), -100))
    for value in (*out, gradient(out, logits)):
        assert torch.equal(value, torch.zeros_like(value))
