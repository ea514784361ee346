"""One chunk of rows on its way through the head in PyTorch: logits, statistics, logit gradients.

All of it happens in one (R, V) buffer. The logits become probabilities in place, and the entropy,
the slope of the softcap and the gradient are functions of the probabilities, so no second tensor of
that size is needed.
R rows of a chunk, D hidden, V vocabulary without padding, r rank of the adapter.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import LMHead, accumulation_dtype, weight_rows
from fastrl_kernels.products import HALF, add_product, product, write_product

BLOCK = 256
"""Columns that the largest logit is looked for in, one after the other."""
LOWEST = -1000.0
"""exp of it is 0 in every dtype, and so is 0 times it."""


class Inputs(NamedTuple):
    """What the head is applied to; S rows in all."""

    hidden_states: Tensor  # (S, D)
    head: LMHead
    target_ids: Tensor  # (S,) negative where ignored
    temperatures: Tensor  # (S,)


class Chunk(NamedTuple):
    """Some rows, with their inputs side by side."""

    row_ids: Tensor  # (R,)
    num_rows: int  # rows past this one only fill the chunk up, and what they give is dropped
    hidden_states: Tensor  # (R, D), zero on ignored rows and on filling
    target_ids: Tensor  # (R, 1), zero on ignored rows
    temperatures: Tensor  # (R, 1)
    ignored: Tensor  # (R,)


class Statistics(NamedTuple):
    """(S,) each: the fields of `LinearLogps`, and what rounding took from lse."""

    logps: Tensor
    entropies: Tensor
    lse: Tensor
    sum_p2: Tensor
    sum_p3: Tensor
    argmax_ids: Tensor
    residuals: Tensor


def empty_statistics(tensor: Tensor, target_ids: Tensor) -> Statistics:
    """Zeros in the dtype of sums, on the tensor's device."""
    dtype = accumulation_dtype(tensor.dtype)
    values = [tensor.new_zeros(target_ids.shape[0], dtype=dtype) for _ in range(6)]
    return Statistics._make([*values[:5], torch.zeros_like(target_ids), values[5]])


class Softmax(NamedTuple):
    """(R, 1) each: what softmax leaves of the logits besides the probabilities."""

    logps: Tensor
    lse: Tensor
    residuals: Tensor  # what rounding took from lse: it is as large as the logits, log p is not
    target_logits: Tensor  # over temperature


def worthwhile_rows(mask: Tensor) -> Tensor:
    """Indices of the rows to compute: those of the mask, but on a GPU all, so as not to wait."""
    if mask.is_cuda:
        return torch.arange(mask.shape[0], device=mask.device)
    return mask.nonzero()[:, 0]


def split(row_ids: Tensor, rows: int, batch_invariant: bool) -> Iterator[tuple[Tensor, int]]:
    """Chunks of row indices, and how many of each are not filling to make all chunks alike."""
    for start in range(0, row_ids.shape[0], rows):
        ids = row_ids[start : start + rows]
        num_rows = ids.shape[0]
        if batch_invariant:
            ids = torch.cat([ids, ids[:1].expand(rows - num_rows)])
        yield ids, num_rows


def column_slices(num_columns: int, columns: int) -> Iterator[slice]:
    """Consecutive slices of the vocabulary."""
    for start in range(0, num_columns, columns):
        yield slice(start, min(start + columns, num_columns))


def gather(inputs: Inputs, ids: Tensor, num_rows: int) -> Chunk:
    """The rows `ids`; those past `num_rows` are filling."""
    target = inputs.target_ids[ids]
    ignored = target < 0
    ignored[num_rows:] = True
    # Ignored rows may hold anything, and zero times NaN would reach the gradient of the weight.
    hidden = inputs.hidden_states[ids].masked_fill_(ignored[:, None], 0)
    if not (hidden.is_cuda and hidden.dtype in HALF):
        hidden = hidden.to(accumulation_dtype(hidden.dtype))
    return Chunk(
        row_ids=ids,
        num_rows=num_rows,
        hidden_states=hidden,
        target_ids=target.clamp_(min=0)[:, None],
        temperatures=inputs.temperatures[ids][:, None],
        ignored=ignored,
    )


def low_rank(chunk: Chunk, head: LMHead, *, padded: bool) -> Tensor | None:
    """(R, r) hidden states after the first half of the adapter."""
    if head.lora_a is None:
        return None
    return product(chunk.hidden_states, head.lora_a.T, padded=padded)


def write_logits(
    out: Tensor, chunk: Chunk, head: LMHead, columns: slice, low_rank: Tensor | None, *,
    padded: bool,
) -> None:  # fmt: skip
    """out (R, columns) = the logits over temperature, after scale and softcap."""
    write_product(out, chunk.hidden_states, weight_rows(head, columns).T, padded=padded)
    if low_rank is not None and head.lora_b is not None:
        # As wide as its other half, which a product on a GPU would round to this one's dtype.
        adapter = head.lora_b[columns].to(low_rank.dtype).T
        add_product(out, low_rank, adapter, scale=head.lora_scale, padded=padded)
    if head.bias is not None:
        out.add_(head.bias[columns])
    if head.logit_scale != 1.0:
        out.mul_(head.logit_scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    out.div_(chunk.temperatures)


def logits_buffer(inputs: Inputs, rows: int, row_ids: Tensor, batch_invariant: bool) -> Tensor:
    """(R, V) room for the logits of one chunk."""
    rows = rows if batch_invariant else min(rows, row_ids.shape[0])
    dtype = accumulation_dtype(inputs.hidden_states.dtype)
    return inputs.hidden_states.new_empty(rows, inputs.head.num_columns, dtype=dtype)


def fill_logits(
    logits: Tensor, chunk: Chunk, inputs: Inputs, columns: int, *, padded: bool
) -> None:
    """logits (R, V) = those of the chunk over temperature, slice by slice."""
    adapted = low_rank(chunk, inputs.head, padded=padded)
    for part in column_slices(logits.shape[1], columns):
        write_logits(logits[:, part], chunk, inputs.head, part, adapted, padded=padded)


def softmax_(logits: Tensor, target_ids: Tensor, columns: int) -> tuple[Softmax, Tensor]:
    """Make (R, V) logits over temperature probabilities in place; with their entropies (R,)."""
    target_logits, row_max = logits.gather(1, target_ids), logits.amax(1, keepdim=True)
    total, total_x = logits.new_zeros(2, logits.shape[0], 1)
    for part in column_slices(logits.shape[1], columns):
        x = _below_largest(logits[:, part], row_max)
        e = torch.exp(x, out=logits[:, part])
        total += e.sum(1, keepdim=True)
        total_x += x.mul_(e).sum(1, keepdim=True)
    logits.mul_(total.reciprocal())
    log_sum = total.log()
    return _softmax(target_logits, row_max, log_sum), (log_sum - total_x / total)[:, 0]


def statistics_(logits: Tensor, target_ids: Tensor, columns: int) -> Statistics:
    """All there is to know of (R, V) logits over temperature, (R,) each; they are lost."""
    target_logits, (row_max, argmax_ids) = logits.gather(1, target_ids), largest(logits)
    total, total_x, total_e2, total_e3 = logits.new_zeros(4, logits.shape[0], 1)
    for part in column_slices(logits.shape[1], columns):
        x = _below_largest(logits[:, part], row_max)
        e = torch.exp(x, out=logits[:, part])
        total += e.sum(1, keepdim=True)
        total_x += x.mul_(e).sum(1, keepdim=True)
        total_e2 += torch.mul(e, e, out=x).sum(1, keepdim=True)
        total_e3 += x.mul_(e).sum(1, keepdim=True)
    log_sum = total.log()
    softmax = _softmax(target_logits, row_max, log_sum)
    found = (
        softmax.logps, log_sum - total_x / total, softmax.lse, total_e2 / total**2,
        total_e3 / total**3, argmax_ids, softmax.residuals,
    )  # fmt: skip
    return Statistics._make(column[:, 0] for column in found)


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(R, 1) largest of (R, V) logits and the first column that has it.

    Maxima of blocks come from vector instructions, which a search of the column does without.
    """
    num_columns = logits.shape[1]
    whole = num_columns - num_columns % BLOCK
    tops = logits[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)
    if whole < num_columns:
        tops = torch.cat([tops, logits[:, whole:].amax(1, keepdim=True)], 1)
    places = tops.argmax(1, keepdim=True) * BLOCK + torch.arange(BLOCK, device=logits.device)
    places.clamp_(max=num_columns - 1)
    inner = logits.gather(1, places).argmax(1, keepdim=True)
    return tops.amax(1, keepdim=True), places.gather(1, inner)


def _below_largest(logits: Tensor, row_max: Tensor) -> Tensor:
    """Logits less the largest of their row, as a copy; finite where a logit is -inf."""
    return logits.sub(row_max).clamp_min_(LOWEST)


def _softmax(target_logits: Tensor, row_max: Tensor, log_sum: Tensor) -> Softmax:
    """From the sum of exp(logit - row_max)."""
    lse = row_max + log_sum
    logps = (target_logits - row_max) - log_sum
    return Softmax(logps, lse, (row_max - lse) + log_sum, target_logits)


class Slopes(NamedTuple):
    """(R, 1) each: what a gradient of the logits needs besides the probabilities."""

    logp: Tensor  # d loss / d logp
    entropy: Tensor | None  # d loss / d entropy; None where all are zero
    entropies: Tensor
    lse: Tensor


def logit_gradients_(
    probs: Tensor, temperatures: Tensor, slopes: Slopes, log_probs: Tensor | None = None, *,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Make a slice of probabilities the gradient of the same logits, before scale and softcap.

    Without the part of the target:
        -p (slope_logp + slope_entropy (log p + entropy)) / temperature
    log_probs: where they are known already, and finite; they are lost.
    """
    scale = logit_scale / temperatures
    factor = None
    if log_probs is None and (slopes.entropy is not None or softcap is not None):
        log_probs = probs.clamp_min(torch.finfo(probs.dtype).tiny).log_()
    if softcap is not None and log_probs is not None:
        factor = softcap_slope_(log_probs.add(slopes.lse).mul_(temperatures), softcap)
    if slopes.entropy is None:
        probs.mul_(-slopes.logp * scale)
    elif log_probs is not None:
        inner = log_probs.add_(slopes.entropies).mul_(slopes.entropy).add_(slopes.logp)
        probs.mul_(inner.mul_(-scale))
    if factor is not None:
        probs.mul_(factor)


def gradients_of_log_probs_(
    log_probs: Tensor, temperatures: Tensor, slopes: Slopes, *, logit_scale: float = 1.0,
    softcap: float | None = None,
) -> None:  # fmt: skip
    """The same from a slice of log-probabilities, which need no other logarithm."""
    needs_log = slopes.entropy is not None or softcap is not None
    kept = log_probs.clamp_min(LOWEST) if needs_log else None
    logit_gradients_(
        log_probs.exp_(), temperatures, slopes, kept, logit_scale=logit_scale, softcap=softcap
    )


def target_gradients(
    target_logits: Tensor, temperatures: Tensor, logp_slope: Tensor, *, logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """(R, 1) what the gradient of the target's logit has besides the part of all logits."""
    gradient = logp_slope * (logit_scale / temperatures)
    if softcap is not None:
        gradient *= softcap_slope_(target_logits * temperatures, softcap)
    return gradient


def softcap_slope_(capped: Tensor, softcap: float) -> Tensor:
    """1 - (z / softcap)^2 of capped logits z, in place."""
    return capped.div_(softcap).square_().neg_().add_(1)
