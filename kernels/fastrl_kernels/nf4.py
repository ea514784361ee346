"""4-bit weights as bitsandbytes stores them, dequantised a few rows at a time.

A value is a codebook entry times the largest magnitude of its block (QLoRA, arXiv:2305.14314,
section 3). Blocks run over the flattened weight, so a row may begin anywhere in one.
V rows, D hidden.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class NF4Weight(NamedTuple):
    """A frozen (V, D) weight in 4 bits; NF4, FP4 or any other codebook of 16 values."""

    packed: Tensor
    """(ceil(V D / 2),) uint8: two indices into the codebook a byte, the first in the high half."""
    absmax: Tensor
    """(ceil(V D / block_size),) float32: the factor of each block."""
    codebook: Tensor
    """(16,) float32"""
    block_size: int
    """Consecutive values that share a factor; even."""
    num_rows: int
    hidden_size: int
    dtype: torch.dtype
    """Of the dequantised rows: that of the products with them."""

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)"""
        return self.num_rows, self.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weight lives."""
        return self.packed.device

    def rows(self, start: int, stop: int) -> Tensor:
        """(stop - start, D) rows in `dtype`: float32 products, rounded once.

        Only the blocks that these rows touch are dequantised. The bits are those of
        `bitsandbytes.functional.dequantize_4bit`.
        """
        assert 0 <= start <= stop <= self.num_rows
        first, last = start * self.hidden_size, stop * self.hidden_size
        first_block, last_block = first // self.block_size, -(-last // self.block_size)
        begin = first_block * self.block_size
        indices = self.packed[begin // 2 : last_block * self.block_size // 2].int()
        # Both values of a byte are one 8-byte word: a gather of words is ten times as fast on a CPU
        # as one of values.
        pairs = torch.cartesian_prod(self.codebook, self.codebook).view(torch.int64)[:, 0]
        values = pairs.index_select(0, indices).view(torch.float32)
        values = _scale_blocks_(values, self.absmax[first_block:last_block], self.block_size)
        return values[first - begin : last - begin].to(self.dtype).view(-1, self.hidden_size)


def from_params4bit(weight: Any, compute_dtype: torch.dtype | None) -> NF4Weight:
    """The weight of a `bitsandbytes.nn.Linear4bit`; bytes are shared, nested statistics resolved.

    weight: a Params4bit on its device. compute_dtype: dtype of the rows, None for that of the
    weight before it was quantised. Raises ValueError where the weight is not quantised yet, or
    bitsandbytes has packed it anew for a CPU.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ValueError(
            f"expected a quantised 4-bit weight, got {type(weight).__name__} of {weight.dtype} "
            "without quant_state; move the model to its device, which quantises it"
        )
    # A forward pass in eval mode on a CPU does this: another order of bytes, factors in bf16.
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "expected a 4-bit weight as it was quantised, got one that bitsandbytes packed anew "
            "for a CPU; load it again and keep the head in training mode"
        )
    num_rows, hidden_size = state.shape
    packed = weight.detach().as_subclass(Tensor).reshape(-1).view(torch.uint8)
    nf4_weight = NF4Weight(
        packed=packed[: -(-num_rows * hidden_size // 2)],
        absmax=_resolved_absmax(state),
        codebook=state.code.float(),
        block_size=state.blocksize,
        num_rows=num_rows,
        hidden_size=hidden_size,
        dtype=compute_dtype or state.dtype,
    )
    check_nf4(nf4_weight)
    return nf4_weight


def check_nf4(weight: NF4Weight) -> None:
    """Raise ValueError unless the parts of the weight fit each other; looks at no values."""
    if weight.block_size < 2 or weight.block_size % 2 or not weight.dtype.is_floating_point:
        raise ValueError(
            "a 4-bit weight needs an even block_size and a floating-point dtype, got "
            f"{weight.block_size} and {weight.dtype}; take them from its quant_state"
        )
    num_values = weight.num_rows * weight.hidden_size
    expected = {
        "packed": ((-(-num_values // 2),), torch.uint8),
        "absmax": ((-(-num_values // weight.block_size),), torch.float32),
        "codebook": ((16,), torch.float32),
    }
    for name, (shape, dtype) in expected.items():
        tensor = getattr(weight, name)
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, weight.device):
            raise ValueError(
                f"{name} of a 4-bit weight of shape {weight.shape} must be {dtype} of shape "
                f"{shape} on {weight.device}, got {tensor.dtype} of shape {tuple(tensor.shape)} on "
                f"{tensor.device}; take all parts from one quant_state"
            )


def _resolved_absmax(state: Any) -> Tensor:
    """(num_blocks,) float32 factors; where these are quantised themselves, by a second state."""
    if not state.nested:
        return state.absmax.float()
    nested = state.state2
    values = nested.code.float().index_select(0, state.absmax.int())
    return _scale_blocks_(values, nested.absmax.float(), nested.blocksize).add_(state.offset)


def _scale_blocks_(values: Tensor, factors: Tensor, block_size: int) -> Tensor:
    """Values times the factors of their blocks, in place where the last block is full."""
    missing = factors.numel() * block_size - values.numel()
    padded = nn.functional.pad(values, (0, missing)) if missing else values
    padded.view(-1, block_size).mul_(factors[:, None])
    return padded[: values.numel()]
