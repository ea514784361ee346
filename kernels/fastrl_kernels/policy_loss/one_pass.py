"""`policy_loss` in PyTorch, one pass: each chunk's gradient is made while its logits are there.

S selected tokens, D hidden, V vocabulary without padding, R rows of a chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.chunks import (
    Chunk,
    Inputs,
    Slopes,
    Softmax,
    column_slices,
    fill_logits,
    gather,
    logit_gradients_,
    logits_buffer,
    low_rank,
    softmax_,
    split,
    target_gradients,
    worthwhile_rows,
)
from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.objectives import Objective, Parameter, evaluate
from fastrl_kernels.objectives.objective import is_zero, rows_of
from fastrl_kernels.plan import MIB, Plan, make_plan, shape_of
from fastrl_kernels.policy_loss.reference import PolicyLoss
from fastrl_kernels.sweep import Gradients, add_head_gradients, empty_gradients, head_sums


class Tokens(NamedTuple):
    """What the objective wants to know of S tokens, (S,) each, in the dtype of sums."""

    advantages: Tensor
    weights: Tensor
    old_logps: Tensor | None  # None: those of this very pass
    ref_logps: Tensor | None
    rollout_weights: Tensor | None


PRODUCTS = ("auto", "gather", "cublas")


def check_products(products: str, dtype: torch.dtype) -> None:
    """Raise ValueError for a choice that the Triton engine does not have."""
    if products not in PRODUCTS or (products == "cublas" and dtype == torch.float16):
        raise ValueError(
            f"products must be one of {', '.join(PRODUCTS)}, and not cublas for float16, whose "
            f"range needs the units of the others; got {products!r} for {dtype}; use auto"
        )


class Losses(NamedTuple):
    """(S,) each."""

    values: Tensor  # loss of each token, weighted
    logps: Tensor
    entropies: Tensor
    slopes: Tensor
    clipped: Tensor


def one_pass(
    inputs: Inputs, tokens: Tokens, objective: Objective, entropy_coef: Parameter, *,
    needs_grad: list[bool], workspace_mb: float, batch_invariant: bool,
) -> tuple[PolicyLoss, Gradients]:  # fmt: skip
    """The loss and the gradients of it; `needs_grad` in the order of `Gradients`.

    Those of the head stay as wide as their sums, to be scaled before they are rounded.
    """
    shape, workspace = shape_of(inputs.hidden_states, inputs.head), int(workspace_mb * MIB)
    shape = shape._replace(trains_hidden=needs_grad[0], trains_weight=needs_grad[1])
    plan = make_plan(
        "one_pass" if any(needs_grad) else "forward", shape, workspace, batch_invariant
    )
    num_tokens = inputs.hidden_states.shape[0]
    out = empty_losses(inputs)
    sums = empty_sums(inputs, needs_grad)
    row_ids = worthwhile_rows((inputs.target_ids >= 0) & (tokens.weights != 0))
    buffer = logits_buffer(inputs, plan.rows, row_ids, batch_invariant)
    for ids, num_rows in split(row_ids, plan.rows, batch_invariant):
        chunk = gather(inputs, ids, num_rows)
        chunk.ignored.logical_or_(tokens.weights[ids] == 0)
        chunk.hidden_states.masked_fill_(chunk.ignored[:, None], 0)
        probs = buffer[: ids.shape[0]]
        fill_logits(probs, chunk, inputs, plan.columns, padded=batch_invariant)
        softmax, entropies = softmax_(probs, chunk.target_ids, plan.columns)
        coefficient = rows_of(entropy_coef, ids, num_tokens)
        losses = _losses(
            chunk, softmax, entropies, tokens, objective.rows(ids, num_tokens), coefficient
        )
        for column, value in zip(out, losses, strict=True):
            column[ids[:num_rows]] = value[:num_rows]
        if any(needs_grad):
            slopes = _slopes(losses, softmax, tokens.weights[ids], coefficient, chunk)
            if not batch_invariant and not probs.is_cuda:
                probs, chunk, slopes, softmax = _keep_active(probs, chunk, slopes, softmax)
            _add_chunk(probs, chunk, slopes, softmax, inputs, plan, sums, batch_invariant)
    result = PolicyLoss(out.values.sum(), out.logps, out.entropies, out.slopes, out.clipped)
    return result, sums


def empty_sums(inputs: Inputs, needs_grad: list[bool]) -> Gradients:
    """Zeros for the gradients; wide for the head, and where float16 may be scaled later on."""
    grads = empty_gradients(inputs.hidden_states, inputs.head[:4], needs_grad)
    dtype = accumulation_dtype(inputs.hidden_states.dtype)
    first = 0 if inputs.hidden_states.dtype == torch.float16 else 1
    return Gradients._make([*grads[:first], *(grad.to(dtype) for grad in grads[first:])])


def empty_losses(inputs: Inputs) -> Losses:
    """Zeros in the shapes and dtypes of the result."""
    hidden, num_tokens = inputs.hidden_states, inputs.hidden_states.shape[0]
    dtype = accumulation_dtype(hidden.dtype)
    columns = [hidden.new_zeros(num_tokens, dtype=dtype) for _ in range(4)]
    return Losses._make([*columns, hidden.new_zeros(num_tokens, dtype=torch.bool)])


def _losses(
    chunk: Chunk, softmax: Softmax, entropies: Tensor, tokens: Tokens, objective: Objective,
    entropy_coef: Parameter,
) -> Losses:  # fmt: skip
    ids, logps = chunk.row_ids, softmax.logps[:, 0]
    token_losses = evaluate(
        objective,
        logps,
        logps if tokens.old_logps is None else tokens.old_logps[ids],
        None if tokens.ref_logps is None else tokens.ref_logps[ids],
        tokens.advantages[ids],
        None if tokens.rollout_weights is None else tokens.rollout_weights[ids],
    )
    weights = tokens.weights[ids]
    losses = Losses(
        values=weights * (token_losses.values - entropy_coef * entropies),
        logps=logps,
        entropies=entropies,
        slopes=weights * token_losses.slopes,
        clipped=token_losses.clipped,
    )
    return Losses._make(value.masked_fill(chunk.ignored, 0) for value in losses)


def _slopes(
    losses: Losses, softmax: Softmax, weights: Tensor, entropy_coef: Parameter, chunk: Chunk
) -> Slopes:
    entropy_slope = None
    if not is_zero(entropy_coef):
        entropy_slope = (-entropy_coef * weights).masked_fill_(chunk.ignored, 0)[:, None]
    return Slopes(losses.slopes[:, None], entropy_slope, losses.entropies[:, None], softmax.lse)


def _keep_active(
    probs: Tensor, chunk: Chunk, slopes: Slopes, softmax: Softmax
) -> tuple[Tensor, Chunk, Slopes, Softmax]:
    """Only the rows with a gradient, moved to the front of the buffer."""
    active = slopes.logp[:, 0] != 0
    if slopes.entropy is not None:
        active = active | (slopes.entropy[:, 0] != 0)
    rows = active.nonzero()[:, 0]
    if rows.shape[0] == probs.shape[0]:
        return probs, chunk, slopes, softmax
    for place, row in enumerate(rows.tolist()):
        if place != row:
            probs[place] = probs[row]

    def of(tensors: tuple) -> list:
        return [x[rows] if isinstance(x, Tensor) else x for x in tensors]

    kept = Chunk._make(of(chunk))._replace(num_rows=rows.shape[0])
    return probs[: rows.shape[0]], kept, Slopes._make(of(slopes)), Softmax._make(of(softmax))


def _add_chunk(
    probs: Tensor, chunk: Chunk, slopes: Slopes, softmax: Softmax, inputs: Inputs, plan: Plan,
    sums: Gradients, padded: bool,
) -> None:  # fmt: skip
    """Make the probabilities logit gradients and take them through the matrix products."""
    head = inputs.head
    constants: dict[str, Any] = {"logit_scale": head.logit_scale, "softcap": head.softcap}
    at_target = target_gradients(
        softmax.target_logits, chunk.temperatures, slopes.logp, **constants
    )
    adapted = low_rank(chunk, head, padded=padded)
    needs_hidden = sums.hidden_states.numel() > 0
    hidden_sum = torch.zeros_like(chunk.hidden_states, dtype=probs.dtype) if needs_hidden else None
    for columns in column_slices(probs.shape[1], plan.columns):
        logit_gradients_(probs[:, columns], chunk.temperatures, slopes, **constants)
    # One write a row; scatter_add_ would give up a fixed order of summation on a GPU.
    probs.scatter_(1, chunk.target_ids, probs.gather(1, chunk.target_ids) + at_target)
    for columns in column_slices(probs.shape[1], plan.columns):
        add_head_gradients(
            head_sums(sums, columns), hidden_sum, probs[:, columns], chunk, head,
            columns, adapted, padded=padded,
        )  # fmt: skip
    if hidden_sum is not None:
        rows = chunk.row_ids[: chunk.num_rows]
        sums.hidden_states[rows] = hidden_sum[: chunk.num_rows].to(sums.hidden_states.dtype)
