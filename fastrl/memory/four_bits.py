"""Linear layers in 4 bits on "meta": the bytes of NF4, and what passes through them take.

What `fastrl.integrations.nf4` makes of a layer, without bitsandbytes: a weight is 0.5 bytes a value
with a factor of 8 bits for each block of 64, and those factors have one of float32 for each 256.
Forward and backward pass make the weight anew.

Legend: O rows of a weight, I columns.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.errors import InputError
from fastrl.integrations.nf4 import BLOCK
from fastrl.weight_only import linears_of

NESTED_BLOCK = 256
"""Factors that share one."""
TABLES = 16 + 256 + 1
"""float32 values of both codes and of what the factors have in common."""


class FourBitLinear(nn.Linear):
    """A frozen linear layer of 4 bits."""

    factors: Tensor

    def __init__(self, linear: nn.Linear, *, compute_dtype: torch.dtype) -> None:
        """compute_dtype: of the products."""
        with torch.device("meta"):
            super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype
        num_values = linear.weight.numel()
        num_blocks = -(-num_values // BLOCK)
        packed = _empty(-(-num_values // 2), torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("factors", _empty(num_blocks, torch.uint8))
        self.register_buffer("nested", _empty(-(-num_blocks // NESTED_BLOCK), torch.float32))
        self.register_buffer("tables", _empty(TABLES, torch.float32))
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.data, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., I) -> (..., O); peft copies what a layer of 4 bits returns."""
        out = _Product.apply(inputs, self)
        return (out if self.bias is None else out + self.bias).clone()

    def full_weight(self) -> Tensor:
        """(O, I), made anew from its factors in float32."""
        factors = _empty(self.factors.numel(), torch.float32)
        weight = _empty(self.out_features * self.in_features, self.compute_dtype)
        del factors
        return weight.view(self.out_features, self.in_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, inputs.dtype
        return inputs.to(layer.compute_dtype) @ layer.full_weight().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad @ ctx.layer.full_weight()).to(ctx.dtype), None


def _empty(count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(count, dtype=dtype, device="meta")


def quantise_on_meta(
    model: Any, *, device: str, compute_dtype: torch.dtype, skipped: Collection[str] = ()
) -> None:
    """Put `FourBitLinear` where `quantise_linears` would put layers of 4 bits."""
    for parent, name in linears_of(model, skipped=skipped):
        linear = getattr(parent, name)
        if device == "cpu" and linear.in_features % BLOCK:
            raise InputError(
                f"4-bit weights on a CPU need inputs that are a multiple of {BLOCK}, but {name} "
                f"has {linear.in_features}; train on a GPU or in another size"
            )
        setattr(parent, name, FourBitLinear(linear, compute_dtype=compute_dtype))
