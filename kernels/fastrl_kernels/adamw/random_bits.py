"""Random bits that are a function of a key and a position, for rounding by chance."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

NUM_TABLES = 4
"""Of positions that are kept."""


def random_bits(start: int, count: int, key: int, device: torch.device) -> Tensor:
    """(count,) int32 of 32 random bits each: those of positions start, start + 1 and so on.

    An integer hash of the position (two multiplications, constants of "lowbias32" by C. Wellons),
    keyed before and between them by the halves of `key`. The bits of a position are the same in
    whatever pieces they are asked for, on every device.
    """
    bits = _positions(count, device) + signed(start + (key >> 32))
    bits ^= (bits >> 16) & 0xFFFF
    bits *= signed(0x7FEB352D)
    bits ^= (bits >> 15) & 0x1FFFF
    bits += signed(key)
    bits *= signed(0x846CA68B)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


@lru_cache(maxsize=NUM_TABLES)
def _positions(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def signed(value: int) -> int:
    """The lowest 32 bits as the int32 that has them."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
