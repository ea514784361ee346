"""`linear_logps` on a GPU: what the kernels are launched with, forward and backward.

S selected tokens, D hidden, V vocabulary without padding, R rows of a chunk, r rank of the adapter.
"""

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.chunks import Inputs, Statistics, empty_statistics
from fastrl_kernels.gathered_products import adapted_rows
from fastrl_kernels.head import LMHead
from fastrl_kernels.launch import (
    NUM_SUMS,
    ROW_WARPS,
    Rows,
    cdiv,
    logits_blocks,
    parts,
    power_of_2,
    product_arguments,
    row_chunks,
    rows_where,
    split_columns,
)
from fastrl_kernels.linear_logps.kernel import logits_kernel, statistics_kernel
from fastrl_kernels.plan import MIB

MAX_ROWS = 8192


def forward(inputs: Inputs, *, workspace_mb: float) -> Statistics:
    """Statistics of every row that has a target; the rest are zero."""
    inputs = dense_inputs(inputs)
    hidden, num_tokens = inputs.hidden_states, inputs.hidden_states.shape[0]
    out = empty_statistics(hidden, inputs.target_ids)
    if num_tokens == 0:
        return out
    num_splits = cdiv(inputs.head.num_columns, split_columns())
    row_bytes = 4 * (NUM_SUMS * num_splits + 2 * hidden.shape[1])
    size = max(1, min(MAX_ROWS, int(workspace_mb * MIB) // row_bytes, num_tokens))
    for rows in row_chunks(rows_where(inputs.target_ids >= 0), size):
        _write_statistics(out, inputs, rows)
    return out


def _write_statistics(out: Statistics, inputs: Inputs, rows: Rows) -> None:
    """Those of some rows; what is in progress is gone when it returns."""
    sums = write_sums(inputs, rows, None)
    statistics_kernel[(rows.ids.shape[0],)](
        sums, rows.ids, rows.num_rows, *out, sums.shape[2], sums.shape[0],
        BLOCK_SPLITS=power_of_2(sums.shape[0]), num_warps=ROW_WARPS,
    )  # fmt: skip


def dense_inputs(inputs: Inputs) -> Inputs:
    """The same inputs with the elements of each row side by side, as the kernels read them."""

    def dense(tensor: Any) -> Any:
        is_dense = not isinstance(tensor, Tensor) or tensor.stride(-1) == 1
        return tensor if is_dense else tensor.contiguous()

    return Inputs(
        dense(inputs.hidden_states), LMHead._make(map(dense, inputs.head)),
        inputs.target_ids.contiguous(), inputs.temperatures.contiguous(),
    )  # fmt: skip


def write_sums(inputs: Inputs, rows: Rows, logits: Tensor | None) -> Tensor:
    """(splits, 7, R) statistics in progress; fills `logits` (R, V) float32 if they are wanted."""
    hidden, split = inputs.hidden_states, split_columns()
    num_rows = rows.ids.shape[0]
    num_splits = cdiv(inputs.head.num_columns, split)
    sums = hidden.new_empty(num_splits, NUM_SUMS, num_rows, dtype=torch.float32)
    adapted = adapted_rows(inputs, rows)
    blocks = logits_blocks(hidden.dtype, hidden.device, inputs.head)
    for part in parts(inputs.head, split):
        runtime, constants = product_arguments(inputs, part, adapted)
        grid = (cdiv(num_rows, blocks.rows), cdiv(part.num_columns, split))
        logits_kernel[grid](
            row_ids_ptr=rows.ids, count_ptr=rows.num_rows, logits_ptr=logits, sums_ptr=sums,
            num_rows=num_rows, tiles_per_split=split // blocks.columns,
            first_split=part.first_column // split,
            logits_stride=0 if logits is None else logits.stride(0),
            STORE=logits is not None, **runtime, **constants,
        )  # fmt: skip
    return sums
