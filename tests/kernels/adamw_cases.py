"""Inputs of adamw_step, for its tests under the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.adamw import Moments, Rates, adamw_step, join, split
from fastrl_kernels.adamw.blockwise import (
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    num_blocks,
)

KEPT = ("float32", "split", "stochastic")


class Case(NamedTuple):
    """What one step reads and writes."""

    weights: Tensor
    gradients: Tensor
    moments: Moments
    remainders: Tensor | None = None

    @property
    def masters(self) -> Tensor:
        """float32 weights."""
        if self.remainders is None:
            return self.weights.float()
        return join(self.weights, self.remainders)

    @property
    def decoded(self) -> tuple[Tensor, Tensor]:
        """Both moments in float32."""
        first, second, first_scales, second_scales = self.moments
        if first_scales is None or second_scales is None:
            return first, second
        return decode_first(first, first_scales), decode_second(second, second_scales)

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step changes."""
        found = [self.weights, self.remainders, *self.moments]
        return [tensor for tensor in found if tensor is not None]

    def part(self, span: slice) -> Case:
        """Some elements, whole blocks but for the last."""
        blocks = slice(num_blocks(span.start), num_blocks(span.stop))
        spans = (span, span, blocks, blocks)
        parts = [None if x is None else x[s] for x, s in zip(self.moments, spans, strict=True)]
        remainders = None if self.remainders is None else self.remainders[span]
        return Case(self.weights[span], self.gradients[span], Moments(*parts), remainders)

    def to(self, device: str) -> Case:
        """A copy on a device."""
        moments = Moments(*(None if x is None else x.to(device, copy=True) for x in self.moments))
        remainders = None if self.remainders is None else self.remainders.to(device, copy=True)
        weights = self.weights.to(device, copy=True)
        return Case(weights, self.gradients.to(device, copy=True), moments, remainders)


def make_case(count: int, *, kept: str, in_8bit: bool, half_gradients: bool) -> Case:
    """Moments over ten powers of e, among them zeros; gradients of the size of the first."""
    generator = torch.Generator().manual_seed(count)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator)

    masters = normal()
    sizes = torch.exp(3 * normal()) * (torch.rand(count, generator=generator) > 0.1)
    sizes[0] = 1.0
    first, second = (
        sizes * normal(),
        sizes.square() * (0.5 + torch.rand(count, generator=generator)),
    )
    gradients = sizes * normal()
    moments = Moments(first, second)
    if in_8bit:
        chances = torch.rand(count, generator=generator)
        (codes1, scales1), (codes2, scales2) = (
            encode_first(first, chances), encode_second(second, chances),
        )  # fmt: skip
        moments = Moments(codes1, codes2, scales1, scales2)
    gradients = gradients.bfloat16() if half_gradients else gradients
    if kept == "float32":
        return Case(masters, gradients, moments)
    if kept == "stochastic":
        return Case(masters.bfloat16(), gradients, moments)
    weights, remainders = split(masters)
    return Case(weights, gradients, moments, remainders)


def stepped(case: Case, rates: Rates, **options: Any) -> Case:
    """The case after one step, which leaves the one given as it is."""
    copied = case.to(case.weights.device.type)
    adamw_step(
        copied.weights, copied.gradients, copied.moments, rates,
        remainders=copied.remainders, **options,
    )  # fmt: skip
    return copied
