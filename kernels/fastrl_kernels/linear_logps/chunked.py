"""`linear_logps` in PyTorch: row chunks, so that the logits of all tokens never exist at once.

The backward makes the logits of each chunk again and uses the derivatives of the log-probability
and the entropy:
    d logp / d z_v = (1[v = target] - p_v) / temperature
    d H / d z_v    = -p_v (log p_v + H) / temperature
S selected tokens, D hidden, V vocabulary without padding, R rows of a chunk, r rank of the adapter.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import LMHead, accumulation_dtype
from fastrl_kernels.linear_logps.plan import Plan, plan_for, round_up
from fastrl_kernels.linear_logps.reference import LinearLogps

HALF = (torch.bfloat16, torch.float16)


class Gradients(NamedTuple):
    """Gradient of each input in the input's dtype; an empty tensor where none was asked for."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor


class Chunk(NamedTuple):
    """Some rows, with their inputs side by side."""

    row_ids: Tensor  # (R,)
    num_rows: int  # rows past this one only fill the chunk up, and what they give is dropped
    hidden_states: Tensor  # (R, D), zero on ignored rows and on filling
    target_ids: Tensor  # (R, 1), zero on ignored rows
    temperatures: Tensor  # (R, 1)
    ignored: Tensor  # (R,)


def forward(
    hidden_states: Tensor,
    head: LMHead,
    target_ids: Tensor,
    temperatures: Tensor,
    *,
    workspace_mb: float,
    batch_invariant: bool,
) -> LinearLogps:
    """Statistics of every row; shapes and meaning as in `linear_logps`."""
    plan = plan_for(hidden_states, head, workspace_mb)
    num_tokens, dtype = hidden_states.shape[0], accumulation_dtype(hidden_states.dtype)
    values = [hidden_states.new_zeros(num_tokens, dtype=dtype) for _ in range(5)]
    out = LinearLogps._make([*values, torch.zeros_like(target_ids)])
    row_ids = _worthwhile_rows(target_ids >= 0)
    for ids, num_rows in _split(row_ids, plan.rows, batch_invariant):
        chunk = _gather(ids, num_rows, hidden_states, target_ids, temperatures)
        logits = _capped_logits(chunk, head, plan).div_(chunk.temperatures)
        for column, value in zip(out, _statistics(logits, chunk.target_ids), strict=True):
            column[ids[:num_rows]] = value.masked_fill_(chunk.ignored, 0)[:num_rows]
    return out


def backward(
    grad_logps: Tensor,
    grad_entropies: Tensor,
    entropies: Tensor,
    hidden_states: Tensor,
    head: LMHead,
    target_ids: Tensor,
    temperatures: Tensor,
    *,
    needs_grad: list[bool],
    workspace_mb: float,
    batch_invariant: bool,
) -> Gradients:
    """Gradients from (S,) incoming slopes; `needs_grad` in the order of `Gradients`.

    A row whose two slopes are zero adds nothing, and on the CPU it costs nothing.
    """
    plan = plan_for(hidden_states, head, workspace_mb)
    dtype = accumulation_dtype(hidden_states.dtype)
    inputs = (hidden_states, head.weight, head.bias, head.lora_a, head.lora_b)
    grads = Gradients(
        torch.zeros_like(hidden_states) if needs_grad[0] else hidden_states.new_zeros(0),
        *(
            torch.zeros_like(tensor, dtype=dtype)
            if tensor is not None and needed
            else hidden_states.new_zeros(0)
            for tensor, needed in zip(inputs[1:], needs_grad[1:], strict=True)
        ),
    )
    has_slope = (target_ids >= 0) & ((grad_logps != 0) | (grad_entropies != 0))
    row_ids = _worthwhile_rows(has_slope)
    for ids, num_rows in _split(row_ids, plan.rows, batch_invariant):
        chunk = _gather(ids, num_rows, hidden_states, target_ids, temperatures)
        logp_slope = grad_logps[ids].masked_fill_(chunk.ignored, 0)
        entropy_slope = grad_entropies[ids].masked_fill_(chunk.ignored, 0)
        logit_grads = _logit_gradients(chunk, head, plan, logp_slope, entropy_slope, entropies[ids])
        _add_gradients(grads, logit_grads, chunk, head, plan)
    return Gradients(
        *(
            grad if tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, inputs, strict=True)
        )
    )


def _worthwhile_rows(mask: Tensor) -> Tensor:
    """Indices of the rows to compute: those of the mask, but on a GPU all, so as not to wait."""
    if mask.is_cuda:
        return torch.arange(mask.shape[0], device=mask.device)
    return mask.nonzero()[:, 0]


def _split(row_ids: Tensor, rows: int, batch_invariant: bool) -> Iterator[tuple[Tensor, int]]:
    """Chunks of row indices, and how many of each are not filling to make all chunks alike."""
    for start in range(0, row_ids.shape[0], rows):
        ids = row_ids[start : start + rows]
        num_rows = ids.shape[0]
        if batch_invariant:
            ids = torch.cat([ids, ids[:1].expand(rows - num_rows)])
        yield ids, num_rows


def _gather(
    ids: Tensor, num_rows: int, hidden_states: Tensor, target_ids: Tensor, temperatures: Tensor
) -> Chunk:
    target = target_ids[ids]
    ignored = target < 0
    ignored[num_rows:] = True
    # Ignored rows may hold anything, and zero times NaN would reach the gradient of the weight.
    hidden = hidden_states[ids].masked_fill_(ignored[:, None], 0)
    if not (hidden.is_cuda and hidden.dtype in HALF):
        hidden = hidden.to(accumulation_dtype(hidden.dtype))
    return Chunk(
        row_ids=ids,
        num_rows=num_rows,
        hidden_states=hidden,
        target_ids=target.clamp_(min=0)[:, None],
        temperatures=temperatures[ids][:, None],
        ignored=ignored,
    )


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Product with sums and result in the accumulation dtype.

    A GPU multiplies half-precision operands exactly; on a CPU the product of two would be rounded,
    so they are cast.
    """
    if left.is_cuda and right.dtype in HALF:
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    if left.is_cuda:
        dtype = accumulation_dtype(left.dtype)
        return left.to(dtype) @ right.to(dtype)
    return (_padded(left) @ _padded(right))[: left.shape[0], : right.shape[1]]


def _padded(matrix: Tensor) -> Tensor:
    """The matrix in the accumulation dtype, with zeros up to multiples of TILE in both directions.

    A CPU's product rounds a row by its place among tails and unaligned rows; now there are none.
    """
    dtype = accumulation_dtype(matrix.dtype)
    shape = [round_up(size) for size in matrix.shape]
    is_dense = matrix.is_contiguous() or matrix.T.is_contiguous()
    if matrix.dtype == dtype and list(matrix.shape) == shape and is_dense:
        return matrix
    padded = matrix.new_zeros(shape, dtype=dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _column_slices(head: LMHead, plan: Plan) -> Iterator[slice]:
    num_columns = head.num_columns
    for start in range(0, num_columns, plan.columns):
        yield slice(start, min(start + plan.columns, num_columns))


def _capped_logits(chunk: Chunk, head: LMHead, plan: Plan) -> Tensor:
    """(R, V) logits after the scale and the softcap, before the temperature."""
    hidden = chunk.hidden_states
    num_columns = head.num_columns
    dtype = accumulation_dtype(hidden.dtype)
    logits = hidden.new_empty(hidden.shape[0], num_columns, dtype=dtype)
    low_rank = None
    if head.lora_a is not None:
        low_rank = _matmul(hidden, head.lora_a.T).mul_(head.lora_scale)  # (R, r)
    for columns in _column_slices(head, plan):
        product = _matmul(hidden, head.weight[columns].T)
        if low_rank is not None and head.lora_b is not None:
            product += _matmul(low_rank, head.lora_b[columns].T)
        logits[:, columns] = product
    if head.bias is not None:
        logits += head.bias[:num_columns]
    if head.logit_scale != 1.0:
        logits *= head.logit_scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _log_softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Make (R, V) logits log-probabilities in place; returns probabilities and (R, 1) logsumexp."""
    row_max = logits.amax(1, keepdim=True)
    probs = logits.sub_(row_max).exp()
    normaliser = probs.sum(1, keepdim=True)
    log_normaliser = normaliser.log()
    logits.sub_(log_normaliser)
    return probs.div_(normaliser), row_max + log_normaliser


def _statistics(logits: Tensor, target_ids: Tensor) -> LinearLogps:
    """Of (R, V) logits over temperature, which it overwrites so that no third such tensor lives."""
    argmax_ids = logits.argmax(1)
    probs, lse = _log_softmax_(logits)
    logps = logits.gather(1, target_ids)[:, 0]
    entropies = logits.mul_(probs).sum(1).neg_()
    powers = torch.mul(probs, probs, out=logits)
    sum_p2 = powers.sum(1)
    sum_p3 = powers.mul_(probs).sum(1)
    return LinearLogps(logps, entropies, lse[:, 0], sum_p2, sum_p3, argmax_ids)


def _logit_gradients(
    chunk: Chunk,
    head: LMHead,
    plan: Plan,
    logp_slope: Tensor,
    entropy_slope: Tensor,
    entropies: Tensor,
) -> Tensor:
    """(R, V) gradient of the logits before scale and softcap, from (R,) slopes."""
    logits = _capped_logits(chunk, head, plan)
    softcap = head.softcap
    capped = None if softcap is None else logits.clone()
    probs, _ = _log_softmax_(logits.div_(chunk.temperatures))
    slope = logp_slope[:, None]
    grads = logits.add_(entropies[:, None]).mul_(entropy_slope[:, None]).add_(slope)
    grads.mul_(probs).neg_()
    # One write a row; scatter_add_ would give up a fixed order of summation on a GPU.
    grads.scatter_(1, chunk.target_ids, grads.gather(1, chunk.target_ids) + slope)
    grads.div_(chunk.temperatures)
    if capped is not None and softcap is not None:
        grads.mul_(capped.div_(softcap).square_().neg_().add_(1))
    if head.logit_scale != 1.0:
        grads *= head.logit_scale
    return grads


def _add_gradients(
    grads: Gradients, logit_grads: Tensor, chunk: Chunk, head: LMHead, plan: Plan
) -> None:
    """Take (R, V) gradients of the logits through the matrix products, slice by slice."""
    hidden, lora_a, lora_b = chunk.hidden_states, head.lora_a, head.lora_b
    low_rank = None if lora_a is None else _matmul(hidden, lora_a.T)  # (R, r)
    low_rank_grad = None if low_rank is None else torch.zeros_like(low_rank)
    hidden_grad = torch.zeros_like(hidden, dtype=logit_grads.dtype)
    needs_hidden, needs_weight, needs_bias, needs_a, needs_b = (grad.numel() > 0 for grad in grads)
    for columns in _column_slices(head, plan):
        tile = logit_grads[:, columns]
        if needs_hidden:
            hidden_grad += _matmul(tile, head.weight[columns])
        if needs_weight:
            grads.weight[columns] += _matmul(tile.T, hidden)
        if lora_b is not None and low_rank is not None and low_rank_grad is not None:
            if needs_b:
                grads.lora_b[columns] += _matmul(tile.T, low_rank).mul_(head.lora_scale)
            if needs_hidden or needs_a:
                low_rank_grad += _matmul(tile, lora_b[columns]).mul_(head.lora_scale)
    if needs_bias:
        grads.bias[: logit_grads.shape[1]] += logit_grads.sum(0)
    if needs_a and low_rank_grad is not None:
        grads.lora_a.add_(_matmul(low_rank_grad.T, hidden))
    if needs_hidden:
        if low_rank_grad is not None and lora_a is not None:
            hidden_grad += _matmul(low_rank_grad, lora_a)
        rows = chunk.row_ids[: chunk.num_rows]
        grads.hidden_states[rows] = hidden_grad[: chunk.num_rows].to(grads.hidden_states.dtype)
