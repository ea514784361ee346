"""What every launch of a head's kernels shares: block shapes, rows by index, parts of the head.

S selected tokens, D hidden, V vocabulary without padding, R rows of a chunk, r rank of the adapter.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastrl_kernels import running_softmax
from fastrl_kernels.chunks import Inputs
from fastrl_kernels.head import LMHead, weight_rows
from fastrl_kernels.implementation import capability_of, interprets_triton
from fastrl_kernels.objectives import Objective, Parameter
from fastrl_kernels.objectives.arguments import kernel_parameters
from fastrl_kernels.objectives.objective import REGULARISER_INPUTS
from fastrl_kernels.products import HALF

NUM_SUMS = running_softmax.NUM_SUMS.value
SPLIT = 2048  # columns whose statistics one program keeps; fixed, so that bits do not depend on S


class Blocks(NamedTuple):
    """Shape of a product's tile and how many threads work on it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def threads(self) -> dict[str, int]:
        """The launch's own keywords."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class HeadTiles(NamedTuple):
    """Tiles of the kernels that multiply with the head; fixed for a device, a dtype and a head."""

    logits: Blocks
    """Of the kernels that end in statistics of logits, or in gradients of a slice of them."""
    logits_with_extras: Blocks
    """The same with a bias, an adapter or a softcap."""
    hidden_gradients: Blocks
    weight_gradients: Blocks


# The tiles that read fewest bytes for an operation among those without spills in a loop, by
# benchmarks/kernel_resources.py; not yet tuned on a device.
HALF_TILES = {
    "large": HeadTiles(
        Blocks(128, 128, 64, 8, 4), Blocks(64, 128, 64, 8, 3), Blocks(128, 256, 64, 8, 3),
        Blocks(128, 256, 64, 8, 3),
    ),
    "small": HeadTiles(
        Blocks(128, 64, 32, 8, 4), Blocks(64, 64, 32, 8, 3), Blocks(128, 128, 32, 8, 4),
        Blocks(128, 128, 32, 8, 4),
    ),
}  # fmt: skip
WIDE_TILES = HeadTiles(
    Blocks(64, 64, 16, 8, 3), Blocks(64, 64, 32, 8, 2), Blocks(64, 64, 16, 8, 3),
    Blocks(64, 64, 16, 8, 3),
)  # fmt: skip
LARGE_CHIPS = ((9, 0),)
"""Capabilities whose blocks hold 227 KiB, for which the large tiles do not spill in a loop."""
INTERPRETED_BLOCKS = Blocks(16, 32, 16, 4, 1)
ROW_BLOCK = 2048  # columns at a time of a program that has a row to itself
ROW_WARPS = 8
INTERPRETED_ROW_BLOCK = 64
INTERPRETED_SPLIT = 96  # several splits in the small vocabularies of tests


@functools.cache
def column_of(device: torch.device) -> str:
    """Which column of a table of tiles a GPU gets, "large" or "small".

    One that is not there, because a plan is made elsewhere, is taken for an H200.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return "large"
    return "large" if capability_of(device) in LARGE_CHIPS else "small"


def head_tiles(dtype: torch.dtype, device: torch.device) -> HeadTiles:
    """Tiles of products with the head; tensor cores take half precision only."""
    if interprets_triton():
        return HeadTiles(*[INTERPRETED_BLOCKS] * len(HeadTiles._fields))
    return HALF_TILES[column_of(device)] if dtype in HALF else WIDE_TILES


def logits_blocks(dtype: torch.dtype, device: torch.device, head: LMHead) -> Blocks:
    """Tile of the kernels that end in statistics or gradients of logits."""
    tiles = head_tiles(dtype, device)
    has_extras = head.bias is not None or head.lora_b is not None or head.softcap is not None
    return tiles.logits_with_extras if has_extras else tiles.logits


def hidden_blocks(dtype: torch.dtype, device: torch.device, num_columns: int) -> Blocks:
    """Tile of products that add up over the vocabulary.

    Rows of gradients that are no multiple of 16 are read number by number, and the addresses of
    those leave too few registers for the large tile.
    """
    if num_columns % 16 and dtype in HALF and not interprets_triton():
        return HALF_TILES["small"].hidden_gradients
    return head_tiles(dtype, device).hidden_gradients


def split_columns() -> int:
    """Columns of one split of the vocabulary."""
    return INTERPRETED_SPLIT if interprets_triton() else SPLIT


def row_block() -> dict[str, int]:
    """Block and threads of the kernels that take one row a program."""
    if interprets_triton():
        return {"BLOCK_V": INTERPRETED_ROW_BLOCK}
    return {"BLOCK_V": ROW_BLOCK, "num_warps": ROW_WARPS}


def upcast() -> dict[str, bool]:
    """The interpreter's tl.dot is wrong for bf16 operands."""
    return {"UPCAST": interprets_triton()}


def power_of_2(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


class Rows(NamedTuple):
    """Some rows, those that count first; how many count is known to the device alone."""

    ids: Tensor  # (R,) int64
    num_rows: Tensor  # (1,) int32


def rows_where(mask: Tensor) -> Rows:
    """All rows, those of the mask (S,) first and in order."""
    order = torch.argsort(mask.logical_not().to(torch.int8), stable=True)
    return Rows(order, mask.sum(dtype=torch.int32)[None])


def row_chunks(rows: Rows, size: int) -> Iterator[Rows]:
    """Consecutive chunks of at most `size` rows."""
    num_rows = rows.ids.shape[0]
    starts = torch.arange(0, max(num_rows, 1), size, device=rows.ids.device, dtype=torch.int32)
    counts = (rows.num_rows - starts).clamp_(0, size).to(torch.int32)
    for index, start in enumerate(range(0, num_rows, size)):
        yield Rows(rows.ids[start : start + size], counts[index : index + 1])


class Part(NamedTuple):
    """Consecutive rows of the head's tensors."""

    first_column: int
    num_columns: int
    weight: Tensor  # (columns, D)
    bias: Tensor | None
    lora_b: Tensor | None


def parts(head: LMHead, columns: int) -> Iterator[Part]:
    """The head whole, or in slices of so many columns where its weight has to be unpacked."""
    num_columns = head.num_columns
    size = num_columns if isinstance(head.weight, Tensor) else columns
    for start in range(0, num_columns, size):
        yield part_of(head, slice(start, min(start + size, num_columns)))


def part_of(head: LMHead, columns: slice) -> Part:
    """Some columns of the head."""
    return Part(
        columns.start,
        columns.stop - columns.start,
        weight_rows(head, columns),
        None if head.bias is None else head.bias[columns],
        None if head.lora_b is None else head.lora_b[columns],
    )


def product_arguments(
    inputs: Inputs, part: Part, adapted: Tensor | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runtime and compile-time arguments of the kernels that multiply with the head."""
    head, hidden = inputs.head, inputs.hidden_states
    has_lora = adapted is not None and part.lora_b is not None
    rank = 0 if part.lora_b is None else part.lora_b.shape[1]
    runtime = {
        "hidden_ptr": hidden,
        "weight_ptr": part.weight,
        "bias_ptr": part.bias,
        "low_rank_ptr": adapted,
        "lora_b_ptr": part.lora_b,
        "target_ids_ptr": inputs.target_ids,
        "temperatures_ptr": inputs.temperatures,
        "num_columns": part.num_columns,
        "first_column": part.first_column,
        "hidden_size": hidden.shape[1],
        "rank": rank,
        "hidden_stride": hidden.stride(0),
        "weight_stride": part.weight.stride(0),
        "low_rank_stride": rank,
        "lora_b_stride": part.lora_b.stride(0) if part.lora_b is not None else 0,
        "lora_scale": float(head.lora_scale),
        "logit_scale": float(head.logit_scale),
        "softcap": float(head.softcap or 1.0),
    }
    blocks = logits_blocks(hidden.dtype, hidden.device, head)
    constants = {
        "HAS_BIAS": part.bias is not None,
        "HAS_LORA": has_lora,
        "HAS_SOFTCAP": head.softcap is not None,
        "BLOCK_M": blocks.rows,
        "BLOCK_V": blocks.columns,
        "BLOCK_D": blocks.depth,
        "BLOCK_R": 16,
        **upcast(),
        **blocks.threads,
    }
    return runtime, constants


def objective_arguments(
    objective: Objective, entropy_coef: Parameter, num_tokens: int
) -> tuple[tuple[Parameter, ...], dict[str, Any]]:
    """Parameters and constants of the kernels that evaluate an objective."""
    parameters, strides, offsets = kernel_parameters(objective, entropy_coef, num_tokens)
    regularisers = objective.active_regularisers
    return parameters, {
        "SURROGATE": kernel_function(objective.surrogate),
        "REGULARISERS": tuple(kernel_function(item.function) for item in regularisers),
        "INPUTS": tuple(REGULARISER_INPUTS.index(item.inputs) for item in regularisers),
        "STRIDES": strides,
        "OFFSETS": offsets,
    }


@functools.cache
def kernel_function(function: Callable[..., Any]) -> Any:
    """An objective's function as a device function, from the same source."""
    return function if hasattr(function, "fn") else triton.jit(function)
