"""Offsets past 2^31 elements: rows far apart in files of which only these rows are written.

16384 rows of 151936 logits are past 2^31 already. A 32-bit offset would wrap around to a place
before the tensor.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrl_kernels import LMHead, linear_logps, selected_logps
from fastrl_kernels.linear_logps import linear_logps_reference
from fastrl_kernels.selected_logps import selected_logps_reference
from tests.kernels.interpreted.conftest import check_statistics

LIMIT = 2**31


def far_apart(tensor: Tensor, path: Path) -> Tensor:
    """The same rows so far apart that the last begins past 2^31 elements, though no stride does."""
    num_rows, width = tensor.shape
    stride = -(-LIMIT // (num_rows - 1)) + 8
    size = stride * (num_rows - 1) + width
    storage = torch.from_file(str(path), shared=True, size=size, dtype=tensor.dtype)
    rows = storage.as_strided((num_rows, width), (stride, 1))
    assert rows[-1].storage_offset() > LIMIT
    assert stride < LIMIT
    return rows.copy_(tensor)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("in_place", [False, True])
def test_logits(tmp_path: Path, in_place: bool) -> None:
    values, target_ids = normal(3, 131, seed=0).bfloat16(), torch.tensor([5, 0, 130])
    logits = far_apart(values, tmp_path / "logits").requires_grad_()
    wide = values.double().requires_grad_()
    out = selected_logps(logits, target_ids, inplace_backward=in_place, implementation="triton")
    truth = selected_logps_reference(wide, target_ids)
    check_statistics(out, truth)
    slopes = normal(3, seed=1)
    (grad,) = torch.autograd.grad(out.logps, logits, slopes)
    (expected,) = torch.autograd.grad(truth.logps, wide, slopes.double())
    assert in_place == (grad.stride() == logits.stride())
    torch.testing.assert_close(grad.double(), expected, rtol=0.01, atol=1e-6)


def test_hidden_states_and_head(tmp_path: Path) -> None:
    hidden, weight = normal(3, 19, seed=0), normal(5, 19, seed=1)
    lora_a, lora_b = normal(2, 19, seed=2), normal(5, 2, seed=3)
    target_ids = torch.tensor([1, -1, 4])
    near = [x.double().requires_grad_() for x in (hidden, weight, lora_a, lora_b)]
    far = [
        far_apart(hidden, tmp_path / "hidden"), far_apart(weight, tmp_path / "weight"), lora_a,
        far_apart(lora_b, tmp_path / "lora_b"),
    ]  # fmt: skip
    for tensor in far:
        tensor.requires_grad_()
    far[1].grad = far_apart(torch.ones(5, 19), tmp_path / "gradient")
    head = LMHead(far[1], lora_a=far[2], lora_b=far[3])
    out = linear_logps(far[0], head, target_ids, accumulate_grad=True, implementation="triton")
    truth = linear_logps_reference(
        near[0], LMHead(near[1], lora_a=near[2], lora_b=near[3]), target_ids
    )
    check_statistics(out, truth)
    (out.logps * torch.arange(3)).sum().backward()
    (truth.logps * torch.arange(3)).sum().backward()
    for index, (tensor, other) in enumerate(zip(far, near, strict=True)):
        expected = other.grad + (index == 1)
        torch.testing.assert_close(tensor.grad.double(), expected, rtol=1e-5, atol=1e-5)
