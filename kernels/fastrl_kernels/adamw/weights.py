"""Where a weight's float32 value is kept while the model computes with bfloat16."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SplitWeights(NamedTuple):
    """A float32 tensor in two halves that together are exactly it."""

    weights: Tensor  # bfloat16: rounded to nearest, ties away from zero
    remainders: Tensor  # int16: what the rounding took, in units of the float32's last place


def split(masters: Tensor) -> SplitWeights:
    """float32 -> bfloat16 and the 16 bits that it lacks: bits = (weights << 16) + remainders.

    Ties go away from zero, not to even: half a unit upwards would not fit into 16 signed bits.
    """
    bits = masters.view(torch.int32)
    upper = ((bits + 0x8000) >> 16).to(torch.int16)
    return SplitWeights(upper.view(torch.bfloat16), bits.to(torch.int16))


def join(weights: Tensor, remainders: Tensor) -> Tensor:
    """The float32 tensor that `split` was given, bit by bit."""
    upper = weights.view(torch.int16).to(torch.int32) << 16
    return (upper + remainders.to(torch.int32)).view(torch.float32)


def round_by_chance(masters: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the odds that make the mean exact.

    bits: int32, of which the lower 16 are used: they are added to the half that is cut off.
    """
    return (
        ((masters.view(torch.int32) + (bits & 0xFFFF)) >> 16).to(torch.int16).view(torch.bfloat16)
    )
