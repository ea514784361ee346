"""head_logits, for whoever samples, against all logits of the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl_kernels import LMHead
from fastrl_kernels.head_logits import head_logits
from fastrl_kernels.products import FEW_ROWS

D, V, R = 19, 123, 3


def make_inputs(num_rows: int, dtype: torch.dtype) -> tuple[Tensor, LMHead]:
    """Hidden states and a head with everything that a head may have, padded columns too."""
    generator = torch.Generator().manual_seed(num_rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = LMHead(
        normal(V + 5, D), normal(V + 5), normal(R, D), normal(V + 5, R), lora_scale=0.7,
        logit_scale=1.3, softcap=9.0, vocab_size=V,
    )  # fmt: skip
    return normal(num_rows, D), head


def truth(hidden: Tensor, head: LMHead, temperature: float) -> Tensor:
    """Every transform in its order, in float64."""
    assert isinstance(head.weight, Tensor)
    assert head.bias is not None
    assert head.lora_a is not None
    assert head.lora_b is not None
    assert head.softcap is not None
    h, w = hidden.double(), head.weight.double()
    logits = h @ w.T + head.lora_scale * (h @ head.lora_a.double().T) @ head.lora_b.double().T
    logits = (logits + head.bias.double()) * head.logit_scale
    return (head.softcap * torch.tanh(logits / head.softcap) / temperature)[:, :V]


@pytest.mark.parametrize("num_rows", [1, FEW_ROWS[0], FEW_ROWS[-1], 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_are_those_of_the_reference(num_rows: int, dtype: torch.dtype) -> None:
    hidden, head = make_inputs(num_rows, dtype)
    logits = head_logits(hidden, head, temperature=0.8)
    assert logits.shape == (num_rows, V)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        logits.double(),
        truth(hidden, head, 0.8),
        rtol=0,
        atol=1e-12 if dtype.itemsize == 8 else 2e-5,
    )


@pytest.mark.parametrize("num_rows", [1, FEW_ROWS[0], FEW_ROWS[-1], 37])
def test_autocast_does_not_round_them(num_rows: int) -> None:
    hidden, head = make_inputs(num_rows, torch.float32)
    expected = head_logits(hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head_logits(hidden, head), expected)
