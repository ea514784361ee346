"""Gradients through the head in PyTorch, from the slopes of every token: `min_memory`'s backward.

Slice by slice of the vocabulary the logits are made again, and with the derivatives of the
log-probability and the entropy become their own gradient:
    d logp / d z_v = (1[v = target] - p_v) / temperature
    d H / d z_v    = -p_v (log p_v + H) / temperature
The gradient of a slice of the weight is complete when all rows have gone by, and is written once.
S selected tokens, D hidden, V vocabulary without padding, R rows of a tile, r rank of the adapter.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.chunks import (
    Chunk,
    Inputs,
    Slopes,
    column_slices,
    gather,
    gradients_of_log_probs_,
    low_rank,
    split,
    target_gradients,
    worthwhile_rows,
    write_logits,
)
from fastrl_kernels.head import LMHead, accumulation_dtype, weight_rows
from fastrl_kernels.plan import MIB, Plan, hidden_block, make_plan, shape_of
from fastrl_kernels.products import add_product, product


class Gradients(NamedTuple):
    """Gradient of each input in the input's dtype; an empty tensor where none was asked for."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor


class TokenSlopes(NamedTuple):
    """What the gradients of S tokens start from, (S,) each."""

    logps: Tensor  # d loss / d logp
    entropies: Tensor | None  # d loss / d entropy; None where all are zero
    logp_values: Tensor
    entropy_values: Tensor
    lse: Tensor
    residuals: Tensor  # what rounding took from lse


def sweep(
    slopes: TokenSlopes, inputs: Inputs, *, needs_grad: list[bool], workspace_mb: float,
    batch_invariant: bool, weight_grad: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients in the order of `needs_grad`, which is that of `Gradients`.

    A row whose two slopes are zero adds nothing, and on the CPU it costs nothing. The gradient of
    the weight is added into `weight_grad` where that is given, and comes back empty.
    """
    workspace = int(workspace_mb * MIB)
    shape = shape_of(inputs.hidden_states, inputs.head)
    shape = shape._replace(trains_hidden=needs_grad[0], trains_weight=needs_grad[1])
    plan = make_plan("min_memory", shape, workspace, batch_invariant)
    grads = empty_gradients(inputs.hidden_states, inputs.head[:4], needs_grad, weight_grad is None)
    targets = grads if weight_grad is None else grads._replace(weight=weight_grad)
    has_slope = slopes.logps != 0
    if slopes.entropies is not None:
        has_slope = has_slope | (slopes.entropies != 0)
    row_ids = worthwhile_rows((inputs.target_ids >= 0) & has_slope)
    block = hidden_block(shape, workspace)
    if row_ids.shape[0] <= block:
        _pass(row_ids, slopes, inputs, plan, targets, batch_invariant)
        return grads
    nothing = inputs.hidden_states.new_zeros(0)
    hidden_only = Gradients(targets.hidden_states, *[nothing] * 4)
    for start in range(0, row_ids.shape[0], block):
        ids = row_ids[start : start + block]
        _pass(ids, slopes, inputs, plan, hidden_only, batch_invariant)
    if any(needs_grad[1:]):
        head_only = targets._replace(hidden_states=nothing)
        _pass(row_ids, slopes, inputs, plan, head_only, batch_invariant)
    return grads


def empty_gradients(
    hidden_states: Tensor, head_tensors: Sequence[object], needs_grad: list[bool],
    new_weight: bool = True,
) -> Gradients:  # fmt: skip
    """Contiguous zeros where a gradient is asked for; the weight's may be somewhere else already.

    head_tensors: weight, bias, lora_a and lora_b, or what stands for them.
    """
    wanted = [needs_grad[0], needs_grad[1] and new_weight, *needs_grad[2:]]
    return Gradients._make(
        torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        if isinstance(tensor, Tensor) and needed
        else hidden_states.new_zeros(0)
        for tensor, needed in zip((hidden_states, *head_tensors), wanted, strict=True)
    )


def _pass(
    row_ids: Tensor, slopes: TokenSlopes, inputs: Inputs, plan: Plan, grads: Gradients,
    padded: bool,
) -> None:  # fmt: skip
    """Take some rows past all slices of the vocabulary, adding to the gradients that have room."""
    head, dtype = inputs.head, accumulation_dtype(inputs.hidden_states.dtype)
    needs_hidden = grads.hidden_states.numel() > 0
    num_rows, hidden_size = row_ids.shape[0], inputs.hidden_states.shape[1]
    hidden_sum, rows_of_sum = grads.hidden_states, row_ids
    if needs_hidden and hidden_sum.dtype != dtype:
        hidden_sum = hidden_sum.new_zeros(num_rows, hidden_size, dtype=dtype)
        rows_of_sum = torch.arange(num_rows, device=row_ids.device)
    lora_a_sum = torch.zeros_like(grads.lora_a, dtype=dtype)
    rows = plan.rows if padded else min(plan.rows, num_rows)
    buffer = inputs.hidden_states.new_empty(rows * plan.columns, dtype=dtype)
    tile_sum = None
    if needs_hidden:
        tile_sum = inputs.hidden_states.new_empty(rows, hidden_size, dtype=dtype)
    for columns in column_slices(head.num_columns, plan.columns):
        sums = head_sums(grads, columns, dtype)._replace(lora_a=lora_a_sum)
        for index, (ids, kept) in enumerate(split(row_ids, plan.rows, padded)):
            chunk = gather(inputs, ids, kept)
            adapted = low_rank(chunk, head, padded=padded)
            tile = buffer[: ids.shape[0] * (columns.stop - columns.start)].view(ids.shape[0], -1)
            write_logits(tile, chunk, head, columns, adapted, padded=padded)
            _make_gradients_(tile, chunk, head, columns, slopes)
            part = None if tile_sum is None else tile_sum[: ids.shape[0]].zero_()
            add_head_gradients(sums, part, tile, chunk, head, columns, adapted, padded=padded)
            if part is not None:
                hidden_sum[rows_of_sum[index * plan.rows :][:kept]] += part[:kept]
        for grad, total in zip(grads[1:], sums[1:], strict=True):
            if total.numel() and total.dtype != grad.dtype and total is not lora_a_sum:
                grad[columns] += total
    if grads.lora_a.numel():
        grads.lora_a.add_(lora_a_sum)
    if needs_hidden and hidden_sum is not grads.hidden_states:
        grads.hidden_states[row_ids] = hidden_sum.to(grads.hidden_states.dtype)


def head_sums(grads: Gradients, columns: slice, dtype: torch.dtype | None = None) -> Gradients:
    """Where the gradients of a slice of the head add up: in place, or in zeros of another dtype."""

    def of(grad: Tensor) -> Tensor:
        if not grad.numel():
            return grad
        part = grad[columns]
        return part if dtype in (None, part.dtype) else torch.zeros_like(part, dtype=dtype)

    return grads._replace(weight=of(grads.weight), bias=of(grads.bias), lora_b=of(grads.lora_b))


def _make_gradients_(
    tile: Tensor, chunk: Chunk, head: LMHead, columns: slice, slopes: TokenSlopes
) -> None:
    """Make (R, columns) logits over temperature the gradient of logits before scale and softcap."""

    def of_chunk(values: Tensor) -> Tensor:
        return values[chunk.row_ids].masked_fill_(chunk.ignored, 0)[:, None]

    local = chunk.target_ids - columns.start
    inside = (local >= 0) & (local < tile.shape[1])
    local = local.clamp_(0, tile.shape[1] - 1)
    target_logits = tile.gather(1, local)
    part = Slopes(
        logp=of_chunk(slopes.logps),
        entropy=None if slopes.entropies is None else of_chunk(slopes.entropies),
        entropies=of_chunk(slopes.entropy_values),
        # Past every logit on ignored rows, so that their probabilities are 0 and not inf times 0.
        lse=slopes.lse[chunk.row_ids].masked_fill_(chunk.ignored, 1e4)[:, None],
    )
    tile.sub_(part.lse).sub_(slopes.residuals[chunk.row_ids][:, None])
    # The target's own log-probability is exact where p is nearly 1 and the gradient nearly 0.
    logps = torch.where(inside, slopes.logp_values[chunk.row_ids][:, None], tile.gather(1, local))
    tile.scatter_(1, local, logps)
    constants: dict[str, Any] = {"logit_scale": head.logit_scale, "softcap": head.softcap}
    gradients_of_log_probs_(tile, chunk.temperatures, part, **constants)
    at_target = target_gradients(target_logits, chunk.temperatures, part.logp, **constants)
    # One write a row; scatter_add_ would give up a fixed order of summation on a GPU.
    tile.scatter_(1, local, tile.gather(1, local) + at_target.masked_fill_(~inside, 0))


def add_head_gradients(
    sums: Gradients, hidden_sum: Tensor | None, tile: Tensor, chunk: Chunk, head: LMHead,
    columns: slice, adapted: Tensor | None, *, padded: bool,
) -> None:  # fmt: skip
    """Take (R, columns) gradients of logits through the matrix products.

    `sums` has the gradients of these columns of the head and of all of lora_a, empty where none is
    asked for. `hidden_sum`: (R, D), or None.
    """
    hidden = chunk.hidden_states
    if hidden_sum is not None:
        add_product(hidden_sum, tile, weight_rows(head, columns), padded=padded)
    if sums.weight.numel():
        add_product(sums.weight, tile.T, hidden, padded=padded)
    if sums.bias.numel():
        sums.bias.add_(tile.sum(0, dtype=sums.bias.dtype))
    if adapted is None or head.lora_a is None or head.lora_b is None:
        return
    if sums.lora_b.numel():
        add_product(sums.lora_b, tile.T, adapted, scale=head.lora_scale, padded=padded)
    if hidden_sum is not None or sums.lora_a.numel():
        adapted_grad = product(tile, head.lora_b[columns], padded=padded).mul_(head.lora_scale)
        if hidden_sum is not None:
            lora_a = head.lora_a.to(adapted_grad.dtype)
            add_product(hidden_sum, adapted_grad, lora_a, padded=padded)
        if sums.lora_a.numel():
            hidden = hidden.to(adapted_grad.dtype)
            add_product(sums.lora_a, adapted_grad.T, hidden, padded=padded)
