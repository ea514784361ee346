"""`selected_logps` in PyTorch: a few rows at a time in one small buffer.

S rows, V vocabulary, R rows of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastrl_kernels.chunks import (
    Slopes,
    Statistics,
    column_slices,
    empty_statistics,
    gradients_of_log_probs_,
    statistics_,
    target_gradients,
)
from fastrl_kernels.head import accumulation_dtype

BUFFER_VALUES = 2**22  # 16 MiB of float32: near the caches, and enough rows for two cores
COLUMNS = 4096


def forward(logits: Tensor, target_ids: Tensor, temperatures: Tensor) -> Statistics:
    """Statistics of every row that has a target; the rest are zero."""
    out = empty_statistics(logits, target_ids)
    for rows, probs in _chunks(logits):
        targets, ignored = target_ids[rows], target_ids[rows] < 0
        _load(probs, logits[rows], temperatures[rows], ignored)
        found = statistics_(probs, targets.clamp(min=0)[:, None], COLUMNS)
        for column, value in zip(out, found, strict=True):
            column[rows] = value.masked_fill(ignored, 0)
    return out


def backward(
    logp_slopes: Tensor, entropy_slopes: Tensor | None, logps: Tensor, entropies: Tensor,
    lse: Tensor, residuals: Tensor, logits: Tensor, target_ids: Tensor, temperatures: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """Write d loss / d logits (S, V) into `out`, which may be the logits themselves."""
    for rows, probs in _chunks(logits):
        ignored = target_ids[rows] < 0
        _load(probs, logits[rows], temperatures[rows], ignored)
        target = target_ids[rows].clamp(min=0)[:, None]
        slope = logp_slopes[rows].masked_fill(ignored, 0)[:, None]
        entropy_slope = None
        if entropy_slopes is not None:
            entropy_slope = entropy_slopes[rows].masked_fill(ignored, 0)[:, None]
        slopes = Slopes(slope, entropy_slope, entropies[rows][:, None], lse[rows][:, None])
        temperature, residual = temperatures[rows][:, None], residuals[rows][:, None]
        at_target = target_gradients(probs.gather(1, target), temperature, slope)
        for columns in column_slices(probs.shape[1], COLUMNS):
            log_probs = probs[:, columns].sub_(slopes.lse).sub_(residual)
            gradients_of_log_probs_(log_probs, temperature, slopes)
        # One write a row; scatter_add_ would give up a fixed order of summation on a GPU.
        probs.scatter_(1, target, probs.gather(1, target) + at_target)
        out[rows] = probs


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, each with room for its values in the dtype of sums."""
    num_rows, num_columns = logits.shape
    size = max(1, min(num_rows, BUFFER_VALUES // num_columns))
    buffer = logits.new_empty(size, num_columns, dtype=accumulation_dtype(logits.dtype))
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        yield slice(start, stop), buffer[: stop - start]


def _load(out: Tensor, logits: Tensor, temperatures: Tensor, ignored: Tensor) -> None:
    """Logits over temperature; zero on ignored rows, which may hold anything."""
    torch.div(logits, temperatures[:, None], out=out)
    if out.is_cuda or ignored.any():  # a GPU would have to be waited for
        out.masked_fill_(ignored[:, None], 0)
