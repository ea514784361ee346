"""Linear layers whose weights are kept in 8 or 4 bits and computed with in full, for a reference.

A weight is cut into blocks of 64 consecutive values; each block has a factor, its largest
magnitude, and codes between -1 and 1: multiples of 1/127 in 8 bits, the 16 levels of NF4 in 4 bits
(QLoRA, arXiv:2305.14314, section 3). Nothing but torch is needed, on any device.

Legend: O rows of a weight, I columns.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastrl.errors import InputError
from fastrl_kernels.nf4 import NF4Weight

BLOCK = 64
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution; those of bitsandbytes."""


class WeightOnlyLinear(nn.Module):
    """A frozen linear layer with a rounded weight: 1 + 4/64 or 0.5 + 4/64 bytes a value."""

    codes: Tensor
    factors: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, *, num_bits: int, dtype: torch.dtype) -> None:
        """dtype: of the products."""
        super().__init__()
        self.shape, self.num_bits, self.dtype = tuple(linear.weight.shape), num_bits, dtype
        weight = linear.weight.detach().float().reshape(-1)
        num_values = weight.numel()
        blocks = functional.pad(weight, (0, -num_values % BLOCK)).view(-1, BLOCK)
        factors = blocks.abs().amax(dim=1)
        scaled = (blocks / factors.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)
        codes = _codes_of_8_bits(scaled) if num_bits == 8 else _codes_of_4_bits(scaled)
        self.register_buffer("codes", codes)
        self.register_buffer("factors", factors)
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """(O, I) what the codes stand for, made anew."""
        num_rows, num_columns = self.shape
        if self.num_bits == 4:
            levels = torch.tensor(NF4_LEVELS, device=self.codes.device)
            packed = NF4Weight(
                self.codes[: -(-num_rows * num_columns // 2)],
                self.factors, levels, BLOCK, num_rows, num_columns, self.dtype,
            )  # fmt: skip
            return packed.rows(0, num_rows)
        values = (self.codes.view(-1, BLOCK) * (self.factors / 127)[:, None]).view(-1)
        return values[: num_rows * num_columns].to(self.dtype).view(num_rows, num_columns)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., I) -> (..., O)"""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return functional.linear(inputs.to(self.dtype), self.weight, bias).to(inputs.dtype)


def _codes_of_8_bits(scaled: Tensor) -> Tensor:
    """int8, for values between -1 and 1."""
    return (scaled * 127).round().to(torch.int8)


def _codes_of_4_bits(scaled: Tensor) -> Tensor:
    """uint8: two indices of the nearest levels a byte, the first in the high half."""
    levels = torch.tensor(NF4_LEVELS, device=scaled.device)
    indices = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return indices[::2] * 16 + indices[1::2]


def linears_of(model: Any, *, skipped: Collection[str] = ()) -> list[tuple[nn.Module, str]]:
    """Parent and name of every linear layer but the head, and but those of the skipped names.

    InputError where the model's weights are mostly elsewhere, as experts in one tensor are.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child not in ends
    ]
    inside = sum(getattr(parent, name).weight.numel() for parent, name in found)
    at_ends = {id(x): x.numel() for end in ends for x in end.parameters()}
    everything = sum(x.numel() for x in model.parameters())
    if 2 * inside < everything - sum(at_ends.values()):
        raise InputError(
            f"only linear layers can be kept in 8 or 4 bits, but {type(model).__name__} has "
            f"{inside / 1e6:.3g}M of its {everything / 1e6:.3g}M weights there; keep it in full"
        )
    return [(parent, name) for parent, name in found if name not in skipped]


def weight_only_copy(model: Any, *, num_bits: int, dtype: torch.dtype) -> Any:
    """A frozen copy of a model: linear layers, the head apart, in few bits, the rest in `dtype`.

    Made layer by layer: there is no copy in full at any time.
    """
    made: dict[int, Any] = {}  # what deepcopy takes instead of copying
    linears = [getattr(parent, name) for parent, name in linears_of(model)]
    for linear in linears:
        made[id(linear)] = WeightOnlyLinear(linear, num_bits=num_bits, dtype=dtype)
    skipped = {id(parameter) for module in linears for parameter in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in skipped:
            made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype, copy=True), False)
    return copy.deepcopy(model, made).eval().requires_grad_(False)
