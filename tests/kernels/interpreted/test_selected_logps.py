"""selected_logps: logits in every dtype, odd sizes and layouts, against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrl_kernels import selected_logps
from fastrl_kernels.selected_logps import selected_logps_reference
from tests.kernels.interpreted.conftest import DTYPES, check_gradients, check_statistics, clean

ROWS, COLUMNS = 9, 203


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_logits(name: str, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """Logits with one feature, NaN in ignored rows, and targets that carry probability."""
    logits = normal(rows, columns) * 3
    target_ids = torch.arange(rows) * 17 % columns
    if name == "minus inf":  # a whole block of the kernel, and the last columns
        logits[:, :64] = logits[:, -5:] = -torch.inf
        target_ids = 64 + target_ids % (columns - 69)
    elif name == "peaked":
        logits[:, 70] += 30
    else:
        logits += {"up": 30, "down": -30, "plain": 0}[name]
    target_ids[2::5] = -1
    logits[2::5] = torch.nan
    return logits, target_ids


def check(
    logits: Tensor, target_ids: Tensor, *, temperature: float | Tensor = 1.0, in_place: bool = False
) -> None:
    """Statistics and gradients against float64."""
    slopes = normal(2, logits.shape[0], seed=1)

    def run(leaf: Tensor, function: Callable[..., tuple], **settings: object) -> tuple:
        leaf = leaf.detach().requires_grad_()
        out = function(leaf, target_ids, **settings)
        weights = tuple(slopes.to(out.logps.dtype))
        return out, torch.autograd.grad((out.logps, out.entropies), leaf, weights)

    wide = temperature.double() if isinstance(temperature, Tensor) else temperature
    truth, expected = run(clean(logits).double(), selected_logps_reference, temperature=wide)
    _, naive = run(clean(logits), selected_logps_reference, temperature=temperature)
    out, gradients = run(
        logits, selected_logps, temperature=temperature, inplace_backward=in_place,
        implementation="triton",
    )  # fmt: skip
    check_statistics(out, truth)
    check_gradients(gradients, naive, expected)
    assert not gradients[0][target_ids < 0].any()
    if logits.numel():
        assert in_place == (gradients[0].data_ptr() == logits.data_ptr())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "up", "down", "peaked", "minus inf"])
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    logits, target_ids = make_logits(name)
    check(logits.to(dtype), target_ids)


@pytest.mark.parametrize(
    ("rows", "columns"), [(0, 203), (1, 1), (7, 5), (3, 63), (2, 64), (3, 65), (5, 192)]
)
def test_sizes_around_the_block(rows: int, columns: int) -> None:
    check(*make_logits("plain", rows, columns))


def test_one_temperature_a_token() -> None:
    logits, target_ids = make_logits("plain")
    check(logits, target_ids, temperature=torch.linspace(0.5, 2, ROWS))


def test_gradients_in_place_of_the_logits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, target_ids = make_logits("plain")
        check(logits.to(dtype), target_ids, in_place=True)


def test_rows_apart_in_memory() -> None:
    logits, target_ids = make_logits("plain")
    wider = torch.nn.functional.pad(logits, (3, 5), value=torch.nan)
    check(wider[:, 3:-5], target_ids)
    check(wider[:, 3:-5], target_ids, in_place=True)
    assert wider[:, :3].isnan().all()
    assert wider[:, -5:].isnan().all()


def test_elements_apart_in_memory() -> None:
    logits, target_ids = make_logits("plain")
    temperature = torch.linspace(0.5, 2, ROWS)
    check(logits.T.contiguous().T, target_ids, temperature=temperature)
    doubled = torch.stack([target_ids, torch.zeros_like(target_ids)], 1)[:, 0]
    check(logits, doubled, temperature=torch.stack([temperature, temperature + 9], 1)[:, 0])


@pytest.mark.parametrize("name", ["logps", "entropies"])
def test_gradient_of_a_plain_sum(name: str) -> None:
    logits, target_ids = make_logits("plain")
    leaf, wide = logits.clone().requires_grad_(), clean(logits).double().requires_grad_()
    out = selected_logps(leaf, target_ids, implementation="triton")
    getattr(out, name).sum().backward()
    getattr(selected_logps_reference(wide, target_ids), name).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-7)


def test_all_rows_ignored() -> None:
    logits = torch.full((3, 70), torch.nan, requires_grad=True)
    out = selected_logps(logits, torch.full((3,), -100), implementation="triton")
    assert not torch.stack([x.detach().double() for x in out]).any()
    (grad,) = torch.autograd.grad(out.logps.sum() + out.entropies.sum(), logits)
    assert not grad.any()


def test_a_row_alone_and_in_a_batch_and_twice() -> None:
    logits, target_ids = make_logits("plain")
    logits = logits.to(torch.bfloat16)
    batch = selected_logps(logits, target_ids, implementation="triton")
    again = selected_logps(logits, target_ids, implementation="triton")
    for rows in ([0], [8, 3], [5]):
        alone = selected_logps(logits[rows], target_ids[rows], implementation="triton")
        for value, all_values, repeated in zip(alone, batch, again, strict=True):
            assert torch.equal(value, all_values[rows])
            assert torch.equal(all_values, repeated)
