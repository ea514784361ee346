"""Moments of Adam in 8 bits: blocks of 256 with a float32 scale each, on a logarithmic scale.

The levels of a block are its largest value times a power of two, down to 2^-16 of it for the first
moment (127 levels and a sign) and 2^-32 for the second (255 levels), so the relative error is the
same for small and large values of a block: levels are 9 % apart. Those of the dynamic map
(arXiv:2110.02861) are 0.7 % apart next to the largest value but 76 % four decades below it (0.4 %
and 44 % for the second moment), and to find one takes a search in a table where a logarithm does.

Rounding is by chance, with odds that make the mean exact. Rounding to the nearest level would
freeze a second moment: with beta2 = 0.999 it moves by a thousandth a step, and never reaches the
next level.

A second moment never becomes 0 unless it is: what is below the lowest level is rounded up to it.
An element whose second moment is 0 while its first is not would be stepped by first / eps.

Legend: M blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_SIZE = 256
TINY = 2.0**-126  # the smallest normal float32


class Levels(NamedTuple):
    """A geometric scale of `size` levels from 2^-octaves to 1."""

    size: int
    octaves: int

    @property
    def per_octave(self) -> float:
        """Levels from a value to its double."""
        return (self.size - 1) / self.octaves

    @property
    def ratio(self) -> float:
        """Of a level to the one below it."""
        return 2.0 ** (1 / self.per_octave)


FIRST = Levels(size=127, octaves=16)
SECOND = Levels(size=255, octaves=32)


def encode_first(values: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """Signed float32 (n,) -> int8 codes (n,) and float32 scales (M,), the mean of the code exact.

    chances: (n,) uniform in [0, 1). Code 0 is zero; a value below the lowest level becomes zero or
    that level.
    """
    parts, scales = _normalised(values.abs())
    chances = _blocks(chances)
    codes = _rounded(parts, chances, FIRST)
    smallest = 2.0**-FIRST.octaves
    codes = torch.where(parts < smallest, (chances < parts / smallest).float(), codes)
    codes = codes.view(-1)[: len(values)]
    return codes.copysign_(values).to(torch.int8), scales


def encode_second(values: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """Non-negative float32 (n,) -> uint8 codes (n,) and float32 scales (M,), as `encode_first`.

    Code 0 is zero exactly; a value below the lowest level becomes that level.
    """
    parts, scales = _normalised(values)
    codes = _rounded(parts, _blocks(chances), SECOND)
    codes.mul_(parts > 0)
    return codes.view(-1)[: len(values)].to(torch.uint8), scales


def decode_first(codes: Tensor, scales: Tensor) -> Tensor:
    """int8 codes (n,) and scales (M,) -> float32 (n,)."""
    codes = codes.float()
    return _decoded(codes.abs(), scales, FIRST).copysign_(codes)


def decode_second(codes: Tensor, scales: Tensor) -> Tensor:
    """uint8 codes (n,) and scales (M,) -> float32 (n,)."""
    return _decoded(codes.float(), scales, SECOND)


def num_blocks(numel: int) -> int:
    """How many scales `numel` values have."""
    return -(-numel // BLOCK_SIZE)


def _blocks(values: Tensor) -> Tensor:
    """(n,) -> (M, 256), zeros behind the end; a view where there is nothing to add."""
    missing = -len(values) % BLOCK_SIZE
    return (pad(values, (0, missing)) if missing else values).view(-1, BLOCK_SIZE)


def _normalised(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) -> (M, 256) parts of the largest in each block, and the largest, (M,)."""
    blocks = _blocks(values)
    scales = blocks.amax(dim=1)
    return blocks / scales.clamp_min(TINY)[:, None], scales


def _rounded(parts: Tensor, chances: Tensor, levels: Levels) -> Tensor:
    """Levels 1 to size, as floats; a part below the lowest level gets that."""
    exact = parts.clamp_min(2.0**-levels.octaves).log2_().mul_(levels.per_octave).add_(levels.size)
    lower = exact.floor()
    # Of the way to the next level, in values rather than in their logarithms.
    way = exact.sub_(lower).div_(levels.per_octave).exp2_().sub_(1).div_(levels.ratio - 1)
    return lower.add_(chances < way).clamp_(1, levels.size)


def _decoded(codes: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    values = (codes - levels.size).div_(levels.per_octave).exp2_().mul_(codes > 0)
    return (_blocks(values) * scales[:, None]).view(-1)[: len(codes)]
