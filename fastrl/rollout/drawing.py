"""One token of each row from its logits, with what it was drawn from.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.rollout import Sampling

BLOCK = 512
"""Columns whose probabilities are added up before a token is looked for among them."""
ROWS_IN_CACHE = 2**20
"""Logits that are worked on at a time on a CPU, where the passes over them should stay in cache."""
LOWEST = -1e4
"""Below this the exponential is 0; keeps 0 * -inf from being NaN."""


class Drawn(NamedTuple):
    """A token of each row, (R,) each."""

    tokens: Tensor  # int64
    logps: Tensor  # fp32, of softmax(logits / temperature), before any truncation or penalty
    entropies: Tensor  # fp32, of the same distribution
    processed_logps: Tensor  # fp32, of the distribution that was drawn from; 0 for a certain token


def draw(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, seen: Tensor | None = None,
    forced: Tensor | None = None,
) -> Drawn:  # fmt: skip
    """Draw a token of each row of logits (R, V) over temperature, fp32, which are overwritten.

    uniforms: (R,) float64 in [0, 1), one a row: the token at which the cumulated probabilities pass
    it, so a row's token depends on nothing but its own logits and number. seen: (R, V) bool, the
    tokens that a repetition penalty is for. forced: (R,) int64, the token of rows that none is
    drawn for, < 0 of the others; with the policy's log-probability like any other.
    """
    num_rows, num_columns = logits.shape
    rows = num_rows if logits.is_cuda else max(1, ROWS_IN_CACHE // num_columns)
    parts = [
        _draw(
            logits[start : start + rows],
            uniforms[start : start + rows],
            sampling,
            None if seen is None else seen[start : start + rows],
            None if forced is None else forced[start : start + rows],
        )
        for start in range(0, num_rows, rows)
    ]
    if len(parts) == 1:
        return parts[0]
    return Drawn(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _draw(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, seen: Tensor | None,
    forced: Tensor | None,
) -> Drawn:  # fmt: skip
    processed = None
    if seen is not None:
        processed = log_softmax_(penalise(logits, seen, sampling.repetition_penalty))
    shifted = logits.sub_(logits.amax(dim=-1, keepdim=True)).clamp_(min=LOWEST)
    weights = shifted.exp()  # (R, V)
    totals = weights.sum(dim=-1)
    log_totals = totals.log()
    entropies = log_totals - torch.linalg.vecdot(weights, shifted) / totals
    if sampling.is_exact:
        tokens = pick(weights, uniforms)
        processed = None
    else:
        if processed is None:
            processed = shifted - log_totals[:, None]
        processed = truncate(processed, sampling)
        if sampling.temperature == 0.0:
            tokens = processed.argmax(dim=-1)
        else:
            tokens = pick(processed.exp(), uniforms)
    if forced is not None:
        tokens = torch.where(forced < 0, tokens, forced)
    logps = shifted.gather(1, tokens[:, None])[:, 0] - log_totals
    drawn_from = _drawn_from(processed, tokens, logps, sampling)
    if forced is not None:
        drawn_from = torch.where(forced < 0, drawn_from, 0.0)
    return Drawn(tokens, logps.float(), entropies.float(), drawn_from)


def _drawn_from(
    processed: Tensor | None, tokens: Tensor, logps: Tensor, sampling: Sampling
) -> Tensor:
    """(R,) log-probabilities of the tokens after truncation and penalties."""
    if processed is None:
        return logps.float()
    if sampling.temperature == 0.0:
        return torch.zeros_like(logps, dtype=torch.float32)
    chosen = processed.gather(1, tokens[:, None])[:, 0]
    return (chosen - processed.logsumexp(dim=-1)).float()


def pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(R,) int64: the column where the cumulated weights (R, V) pass `uniforms` of their sum.

    Weights need not add up to 1; one of 0 is never picked. Sums of blocks first, then the columns
    of one block, both in float64.
    """
    num_columns = weights.shape[1]
    whole = num_columns - num_columns % BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1) if whole else weights[:, :0]
    if whole < num_columns:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=1)
    sums = sums.double()
    ends = sums.cumsum(dim=1)
    targets = uniforms.to(weights.device, torch.float64)[:, None] * ends[:, -1:]
    block = _passed(ends, targets)
    targets = targets - (ends - sums).gather(1, block)
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=num_columns - 1)).double()
    inside.masked_fill_(columns >= num_columns, 0.0)
    column = _passed(inside.cumsum(dim=1), targets)
    return columns.gather(1, column)[:, 0].clamp(max=num_columns - 1)


def _passed(ends: Tensor, targets: Tensor) -> Tensor:
    """(R, 1) the first column whose end is past the target, and at most the last that adds any."""
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())
    passed = torch.minimum(torch.searchsorted(ends, targets.contiguous(), right=True), last)
    return passed.clamp(max=ends.shape[1] - 1)  # sums may be NaN, which the caller reports


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """(R, V) logits of seen tokens divided by the penalty where positive, else times it.

    The repetition penalty of CTRL (arXiv:1909.05858 section 4.1) as transformers applies it; before
    or after the temperature is the same.
    """
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def truncate(logps: Tensor, sampling: Sampling) -> Tensor:
    """(R, V) log-probabilities with the tokens excluded by top-k, top-p or min-p at -inf."""
    if 0 < sampling.top_k < logps.shape[-1]:
        kth = logps.topk(sampling.top_k, dim=-1).values[:, -1:]
        logps = logps.masked_fill(logps < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logps.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # the most likely token always stays
        dropped = torch.zeros_like(logps, dtype=torch.bool)
        dropped.scatter_(1, order, before >= sampling.top_p)
        logps = logps.masked_fill(dropped, -torch.inf)
    if sampling.min_p > 0.0:
        floor = logps.amax(dim=-1, keepdim=True) + torch.log(logps.new_tensor(sampling.min_p))
        logps = logps.masked_fill(logps < floor, -torch.inf)
    return logps


def log_softmax_(logits: Tensor) -> Tensor:
    """log_softmax over the columns, in place."""
    return logits.sub_(logits.logsumexp(dim=-1, keepdim=True))
