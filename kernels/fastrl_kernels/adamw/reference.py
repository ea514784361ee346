"""One step of AdamW over a flat piece of a parameter, whatever it is kept in; the obvious torch.

Legend: n elements, M = ceil(n / 256) blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.adamw.blockwise import (
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)
from fastrl_kernels.adamw.random_bits import random_bits
from fastrl_kernels.adamw.weights import join, round_by_chance, split


class Rates(NamedTuple):
    """The numbers of one AdamW step (arXiv:1711.05101)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int  # from 1

    @property
    def corrections(self) -> tuple[float, float]:
        """Of both moments, for their start at zero."""
        return 1 - self.beta1**self.step, 1 - self.beta2**self.step


class Moments(NamedTuple):
    """Averages of the gradient and of its square: float32, or codes of 8 bits with scales."""

    first: Tensor  # (n,) float32 or int8
    second: Tensor  # (n,) float32 or uint8
    first_scales: Tensor | None = None  # (M,) float32, of codes
    second_scales: Tensor | None = None


class Keys(NamedTuple):
    """Of what is rounded by chance, 64 bits each: functions of seed, parameter and step."""

    moments: int = 0
    weights: int = 0


ZERO_KEYS = Keys()


def adamw_step_reference(
    weights: Tensor, gradients: Tensor, moments: Moments, rates: Rates, *, scale: float = 1.0,
    remainders: Tensor | None = None, start: int = 0, keys: Keys = ZERO_KEYS,
) -> None:  # fmt: skip
    """See `adamw_step`."""
    masters = weights.float() if remainders is None else join(weights, remainders)
    gradients = gradients.float()
    if scale != 1.0:
        gradients = gradients * scale
    first, second = moments.first, moments.second
    if moments.first_scales is not None and moments.second_scales is not None:
        first = decode_first(moments.first, moments.first_scales)
        second = decode_second(moments.second, moments.second_scales)
    adamw_(masters, gradients, first, second, rates)
    if moments.first_scales is not None and moments.second_scales is not None:
        bits = random_bits(start, len(weights), keys.moments, weights.device)
        lower, upper = (bits & 0xFFFF) * 2.0**-16, (bits >> 16 & 0xFFFF) * 2.0**-16
        _put((moments.first, moments.first_scales), encode_first(first, lower))
        _put((moments.second, moments.second_scales), encode_second(second, upper))
    if remainders is not None:
        _put((weights, remainders), split(masters))
    elif weights.dtype == torch.bfloat16:
        bits = random_bits(start, len(weights), keys.weights, weights.device)
        weights.copy_(round_by_chance(masters, bits))


def adamw_(weights: Tensor, gradients: Tensor, first: Tensor, second: Tensor, rates: Rates) -> None:
    """One step of AdamW in place, for float32 tensors of one shape.

    The operations and their order are those of torch.optim.AdamW, so that the bits are too.
    """
    correction1, correction2 = rates.corrections
    weights.mul_(1 - rates.lr * rates.weight_decay)
    first.lerp_(gradients, 1 - rates.beta1)
    second.mul_(rates.beta2).addcmul_(gradients, gradients, value=1 - rates.beta2)
    denominator = second.sqrt().div_(correction2**0.5).add_(rates.eps)
    weights.addcdiv_(first, denominator, value=-rates.lr / correction1)


def _put(targets: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
