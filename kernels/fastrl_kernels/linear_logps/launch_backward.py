"""Gradients through the head on a GPU, from the slopes of every token, slice by slice of V.

S selected tokens, D hidden, V vocabulary without padding, R rows of a tile, r rank of the adapter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.chunks import Inputs, column_slices
from fastrl_kernels.gathered_products import (
    Gathered,
    adapted_rows,
    add_column_sums,
    add_hidden_gradients,
    add_weight_gradients,
    unit_of,
)
from fastrl_kernels.launch import (
    Part,
    Rows,
    cdiv,
    logits_blocks,
    part_of,
    product_arguments,
    row_chunks,
    rows_where,
    split_columns,
)
from fastrl_kernels.linear_logps.kernel import slice_gradients_kernel
from fastrl_kernels.linear_logps.launch import dense_inputs
from fastrl_kernels.plan import MIB
from fastrl_kernels.products import add_product
from fastrl_kernels.sweep import Gradients, TokenSlopes, empty_gradients, head_sums

MAX_ROWS = 16384
COPIED_ROWS = 1024  # of hidden states at a time, in float32


def backward(
    slopes: TokenSlopes, inputs: Inputs, *, needs_grad: list[bool], workspace_mb: float,
    weight_grad: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """As `sweep`, without waiting for the device."""
    inputs = dense_inputs(inputs)
    hidden = inputs.hidden_states
    grads = empty_gradients(hidden, inputs.head[:4], needs_grad, weight_grad is None)
    if hidden.shape[0] == 0:
        return grads
    targets = grads if weight_grad is None else grads._replace(weight=weight_grad)
    if weight_grad is not None and weight_grad.stride(-1) != 1:
        targets = targets._replace(
            weight=torch.zeros_like(weight_grad, memory_format=torch.contiguous_format)
        )
    entropy_slopes = slopes.entropies
    if entropy_slopes is None:
        entropy_slopes = torch.zeros_like(slopes.logps)
    slopes = slopes._replace(logps=slopes.logps.contiguous(), entropies=entropy_slopes.contiguous())
    has_slope = (inputs.target_ids >= 0) & ((slopes.logps != 0) | (entropy_slopes != 0))
    rows = rows_where(has_slope)
    workspace = int(workspace_mb * MIB)
    block = max(1, workspace // 4 // (4 * hidden.shape[1]))
    given = torch.stack([slopes.logps, entropy_slopes]).masked_fill(~has_slope, 0)
    unit = unit_of(given, hidden.dtype)
    size = max(1, min(MAX_ROWS, workspace // 4 // (split_columns() * hidden.dtype.itemsize)))
    pass_of = _Pass(inputs, slopes, unit, size)
    if hidden.shape[0] <= block or not needs_grad[0]:
        pass_of.add(rows, targets)
    else:
        nothing = hidden.new_zeros(0)
        for some in row_chunks(rows, block):
            pass_of.add(some, Gradients(targets.hidden_states, *[nothing] * 4))
        if any(needs_grad[1:]):
            pass_of.add(rows, targets._replace(hidden_states=nothing))
    if weight_grad is not None and targets.weight is not weight_grad:
        weight_grad += targets.weight
    return grads


class _Pass(NamedTuple):
    """One way past all slices of the vocabulary."""

    inputs: Inputs
    slopes: TokenSlopes
    unit: Tensor
    size: int  # rows of a tile

    def add(self, rows: Rows, grads: Gradients) -> None:
        """Add what these rows give to the gradients that have room."""
        inputs, head = self.inputs, self.inputs.head
        hidden = inputs.hidden_states
        num_rows = rows.ids.shape[0]
        size = min(self.size, num_rows)
        hidden_sum = None
        if grads.hidden_states.numel():
            hidden_sum = hidden.new_zeros(1, num_rows, hidden.shape[1], dtype=torch.float32)
        adapted_sum = None
        if head.lora_b is not None and (hidden_sum is not None or grads.lora_a.numel()):
            adapted_sum = hidden.new_zeros(1, num_rows, head.lora_b.shape[1], dtype=torch.float32)
        all_adapted = adapted_rows(inputs, rows)
        buffer = hidden.new_empty(size, split_columns())
        slots = torch.arange(size, dtype=torch.int32, device=hidden.device)
        for columns in column_slices(head.num_columns, split_columns()):
            part = part_of(head, columns)
            sums = head_sums(grads, columns, torch.float32)
            for index, some in enumerate(row_chunks(rows, size)):
                places = slice(index * size, index * size + some.ids.shape[0])
                adapted = None if all_adapted is None else all_adapted[places]
                self.write_gradients(buffer, some, part, adapted)
                gradients = buffer[: some.ids.shape[0], : part.num_columns]
                chunk = Gathered(gradients, slots[: some.ids.shape[0]], some.num_rows, self.unit)
                add_head_gradients(sums, chunk, inputs, some, adapted, head.lora_scale)
                if hidden_sum is not None:
                    out = hidden_sum[:, places]
                    add_hidden_gradients(out, chunk, part.weight, is_first=False)
                if adapted_sum is not None and part.lora_b is not None:
                    out = adapted_sum[:, places]
                    add_hidden_gradients(out, chunk, part.lora_b, is_first=False)
            for grad, total in zip(grads, sums, strict=True):
                if total.numel() and total.dtype != grad.dtype:
                    grad[columns] += total
        finish_hidden(grads, hidden_sum, adapted_sum, inputs, rows.ids)

    def write_gradients(self, out: Tensor, rows: Rows, part: Part, adapted: Tensor | None) -> None:
        """out (R, columns): gradients of a slice of the logits, in units."""
        runtime, constants = product_arguments(self.inputs, part, adapted)
        blocks = logits_blocks(out.dtype, out.device, self.inputs.head)
        grid = (cdiv(rows.ids.shape[0], blocks.rows), cdiv(part.num_columns, blocks.columns))
        slice_gradients_kernel[grid](
            row_ids_ptr=rows.ids, count_ptr=rows.num_rows, logp_slopes_ptr=self.slopes.logps,
            entropy_slopes_ptr=self.slopes.entropies, logps_ptr=self.slopes.logp_values,
            entropies_ptr=self.slopes.entropy_values,
            lse_ptr=self.slopes.lse, residuals_ptr=self.slopes.residuals, unit_ptr=self.unit,
            gradients_ptr=out,
            gradients_stride=out.stride(0), **runtime, **constants,
        )  # fmt: skip


def add_head_gradients(
    sums: Gradients, chunk: Gathered, inputs: Inputs, rows: Rows, adapted: Tensor | None,
    lora_scale: float,
) -> None:  # fmt: skip
    """Add to the gradients of weight, bias and lora_b, float32, that have room."""
    if sums.weight.numel():
        add_weight_gradients(sums.weight, chunk, inputs.hidden_states, rows.ids)
    if sums.bias.numel():
        add_column_sums(sums.bias, chunk)
    if sums.lora_b.numel() and adapted is not None:
        add_weight_gradients(sums.lora_b, chunk, adapted, None, scale=lora_scale)


def finish_hidden(
    grads: Gradients, hidden_sum: Tensor | None, adapted_sum: Tensor | None, inputs: Inputs,
    token_ids: Tensor,
) -> None:  # fmt: skip
    """Write the sums (splits, R, D) where their tokens belong, with the adapter's first half."""
    lora_a = inputs.head.lora_a
    adapted_grad = None
    if adapted_sum is not None:
        adapted_grad = adapted_sum.sum(0).mul_(inputs.head.lora_scale)
        if grads.lora_a.numel():
            grads.lora_a.add_(_first_half(adapted_grad, inputs.hidden_states, token_ids))
    if hidden_sum is not None:
        total = hidden_sum[0] if hidden_sum.shape[0] == 1 else hidden_sum.sum(0)
        if adapted_grad is not None and lora_a is not None:
            add_product(total, adapted_grad, lora_a.float())
        grads.hidden_states.index_copy_(0, token_ids, total.to(grads.hidden_states.dtype))


def _first_half(adapted_grad: Tensor, hidden_states: Tensor, token_ids: Tensor) -> Tensor:
    """(r, D) adapted_grad^T hidden_states[token_ids] in float32, of which few rows are copied."""
    size = (adapted_grad.shape[1], hidden_states.shape[1])
    total = hidden_states.new_zeros(size, dtype=torch.float32)
    parts = (x.split(COPIED_ROWS) for x in (adapted_grad, token_ids))
    for gradient, ids in zip(*parts, strict=True):
        hidden = hidden_states[ids].float()
        # Rows that do not count have zero gradients but may hold NaN.
        hidden.masked_fill_((gradient == 0).all(1, keepdim=True), 0)
        add_product(total, gradient.T, hidden)
    return total
