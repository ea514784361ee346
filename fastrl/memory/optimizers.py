"""What optimizers keep of a parameter and take to step it, and optimizers that only say so.

Legend: n elements of a parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.memory.ledger import Ledger, inside_of
from fastrl.optim import LeanAdamW
from fastrl.optim.lean import CHUNK_SIZES, SMALL
from fastrl.optim.make import MOMENTS
from fastrl.optim.moments import spans_of
from fastrl_kernels.adamw import Moments, Rates, adamw_step
from fastrl_kernels.adamw.blockwise import num_blocks
from fastrl_kernels.adamw.random_bits import NUM_TABLES

LIBRARY_BITS = {
    "bnb_adamw_8bit": 8, "bnb_paged_adamw_8bit": 8,
    "torchao_adamw_8bit": 8, "torchao_adamw_4bit": 4,
}  # fmt: skip
"""Of each moment of the optimizers of libraries; paged ones are on the device while they step."""

LIBRARY_BLOCK = {8: 256, 4: 128}
"""Values that share a float32 scale there."""


class Kept(NamedTuple):
    """How the state of trained weights is kept."""

    optimizer: str  # as in `OptimConfig`
    precision: str  # as in `ModelConfig`
    device: str

    def bytes_of(self, parameter: Tensor) -> int:
        """Of a parameter, on the device."""
        numel = parameter.numel()
        is_half = parameter.dtype == torch.bfloat16
        remainders = 2 * numel if self.precision == "split" and is_half else 0
        return remainders + moment_bytes(self.optimizer, numel, self.device)

    def bytes_of_positions(self, parameters: Iterable[Tensor]) -> int:
        """Of the tables of positions that rounding by chance keeps on a CPU."""
        found: dict[int, None] = {}
        for parameter in parameters:
            numel, is_half = parameter.numel(), parameter.dtype == torch.bfloat16
            is_coded = self.optimizer == "adamw_8bit" and numel >= SMALL
            if self.device == "cuda" or not (
                is_coded or (self.precision == "stochastic" and is_half)
            ):
                continue
            for span in spans_of(numel, CHUNK_SIZES["cpu"]):
                length = span.stop - span.start
                found.pop(length, None)
                found[length] = None  # the newest is the last
                if len(found) > NUM_TABLES:
                    del found[next(iter(found))]
        return 4 * sum(found)


def moment_bytes(optimizer: str, numel: int, device: str) -> int:
    """Both moments of a parameter, on the device."""
    if optimizer == "adamw_offload" and device == "cuda":
        return 0
    bits = 8 if optimizer == "adamw_8bit" else LIBRARY_BITS.get(optimizer)
    if bits is None or numel < SMALL:
        return 8 * numel
    blocks = num_blocks(numel) if optimizer in MOMENTS else -(-numel // LIBRARY_BLOCK[bits])
    return 2 * (-(-numel * bits // 8) + 4 * blocks)


class CountedAdamW(LeanAdamW):
    """Takes what a step of its class takes, and leaves all as it is."""

    def __init__(self, params: Any, *, kept: Kept, ledger: Ledger) -> None:
        super().__init__(params, weights="split", moments=MOMENTS.get(kept.optimizer, "float32"))
        self.ledger = ledger
        # Found out here, because it is counted by a ledger too.
        self.scratch = {x: scratch_bytes(kept, x.numel(), x.dtype) for x in self._index}

    def step_parameter(self, parameter: Tensor, *, scale: float = 1.0) -> None:
        """See `LeanAdamW`."""
        self.ledger.pulse("optimizer", self.scratch[parameter])

    def reserve(self, parameters: Iterable[Tensor]) -> None:
        """See `LeanAdamW`; the state is counted as there already."""


class CountedLibrary(torch.optim.Optimizer):
    """An optimizer of a library, which steps all parameters at once and in place."""

    def __init__(self, params: Any, *, ledger: Ledger) -> None:
        super().__init__(params, {})
        self.ledger = ledger

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take nothing that is known."""


def counted(params: Any, *, kept: Kept, ledger: Ledger) -> torch.optim.Optimizer:
    """The optimizer of these groups of parameters."""
    if kept.optimizer in MOMENTS:
        return CountedAdamW(params, kept=kept, ledger=ledger)
    return CountedLibrary(params, ledger=ledger)


@functools.lru_cache(maxsize=256)
def scratch_bytes(kept: Kept, numel: int, dtype: torch.dtype) -> int:
    """What stepping a parameter takes for a moment."""
    moments = MOMENTS[kept.optimizer]
    if kept.device == "cuda":
        longest = min(numel, CHUNK_SIZES["cuda"])
        num_buffers = min(2, -(-numel // CHUNK_SIZES["cuda"]))
        return num_buffers * 2 * 4 * longest if moments == "cpu" else 0
    count = min(numel, CHUNK_SIZES["cpu"])
    is_coded = moments == "8bit" and numel >= SMALL

    def empty(dtype: torch.dtype, size: int = count) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    state = Moments(empty(torch.float32), empty(torch.float32))
    if is_coded:
        scales = (empty(torch.float32, num_blocks(count)) for _ in range(2))
        state = Moments(empty(torch.int8), empty(torch.uint8), *scales)
    is_half = dtype == torch.bfloat16
    remainders = empty(torch.int16) if kept.precision == "split" and is_half else None
    weights, gradients = empty(dtype), empty(dtype)
    rates = Rates(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    inside = inside_of(
        lambda: adamw_step(weights, gradients, state, rates, scale=0.5, remainders=remainders)
    )
    return inside + (8 * count if moments == "cpu" else 0)
