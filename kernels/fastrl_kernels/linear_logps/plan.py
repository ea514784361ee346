"""How many rows and columns of logits are alive at once, and the memory that takes.

S selected tokens, D hidden, V vocabulary without padding, r rank of the adapter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import LMHead, accumulation_dtype

MIB = 2**20
TILE = 16  # matrix products run on multiples of this many rows and columns
MAX_ROWS = 1024  # enough rows to share each slice of the weight; more would only take memory
SCALARS_PER_ROW = 32  # ids, temperatures, maxima, sums and slopes of one row


class Plan(NamedTuple):
    """Chunk shapes of one `linear_logps`, forward and backward."""

    rows: int
    """Tokens in a chunk; with `batch_invariant` the last chunk is filled up to it."""
    columns: int
    """Columns of the weight in one matrix product; a chunk spans all V of them."""
    workspace_bytes: int
    """Most memory a chunk takes, outputs and gradients apart."""


def plan_rows(
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    rank: int = 0,
    has_softcap: bool = False,
    workspace_mb: float = 256,
) -> Plan:
    """Largest chunk that fits `workspace_mb` (MiB), the same for every number of tokens.

    A quarter goes to the products with a slice of the weight. The rest goes to the rows, each with
    the logits, the probabilities and, for the slope of a softcap, the capped logits over all of V.
    """
    itemsize = accumulation_dtype(dtype).itemsize
    workspace = int(workspace_mb * MIB)
    width = round_up(hidden_size) + round_up(rank)
    # A slice of the weight in the accumulation dtype and the gradient of that slice.
    column_bytes = 2 * width * itemsize
    columns = min(round_up(vocab_size), max(TILE, round_up(workspace // 4 // column_bytes) - TILE))
    product_values = 2 * columns + 6 * width
    row_values = (3 if has_softcap else 2) * vocab_size + product_values + SCALARS_PER_ROW
    row_bytes = row_values * itemsize
    # The gradients of the bias and of lora_a are summed over one chunk before they are added up,
    # and a product takes a whole tile of rows even for one.
    fixed_values = vocab_size + rank * width + TILE * product_values
    fixed_bytes = columns * column_bytes + fixed_values * itemsize
    rows = min(MAX_ROWS, (workspace - fixed_bytes) // row_bytes)
    if rows > TILE:
        rows -= rows % TILE
    if rows < 1:
        least = 2 * (fixed_bytes + row_bytes) / MIB
        raise ValueError(
            f"workspace_mb must hold one row of {vocab_size} logits, got {workspace_mb}; "
            f"give it at least {least:.3g}"
        )
    return Plan(rows=rows, columns=columns, workspace_bytes=rows * row_bytes + fixed_bytes)


def round_up(size: int) -> int:
    """The next multiple of TILE."""
    return -(-size // TILE) * TILE


def plan_for(hidden_states: Tensor, head: LMHead, workspace_mb: float) -> Plan:
    """The plan that `linear_logps` follows for these inputs."""
    return plan_rows(
        head.num_columns,
        hidden_states.shape[1],
        dtype=hidden_states.dtype,
        rank=0 if head.lora_a is None else head.lora_a.shape[0],
        has_softcap=head.softcap is not None,
        workspace_mb=workspace_mb,
    )
