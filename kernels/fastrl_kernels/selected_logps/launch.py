"""`selected_logps` on a GPU: what its kernels are launched with."""

import torch
from torch import Tensor

from fastrl_kernels.chunks import Statistics, empty_statistics
from fastrl_kernels.launch import NUM_SUMS, cdiv, row_block, rows_where
from fastrl_kernels.linear_logps.kernel import statistics_kernel
from fastrl_kernels.selected_logps.kernel import stored_gradients_kernel, stored_logits_kernel


def forward(logits: Tensor, target_ids: Tensor, temperatures: Tensor) -> Statistics:
    """Statistics of every row that has a target; the rest are zero."""
    num_rows, num_columns = logits.shape
    target_ids, temperatures = target_ids.contiguous(), temperatures.contiguous()
    out = empty_statistics(logits, target_ids)
    if num_rows == 0:
        return out
    rows = rows_where(target_ids >= 0)
    sums = logits.new_empty(1, NUM_SUMS, num_rows, dtype=torch.float32)
    stored_logits_kernel[(num_rows,)](
        logits, None, rows.ids, rows.num_rows, target_ids, temperatures, sums, num_rows,
        num_columns, logits.stride(0), 1.0, 1.0, BY_SLOT=False, HAS_BIAS=False, HAS_SOFTCAP=False,
        REWRITE=False, **row_block(),
    )  # fmt: skip
    statistics_kernel[(num_rows,)](sums, rows.ids, rows.num_rows, *out, num_rows, 1, BLOCK_SPLITS=1)
    return out


def backward(
    logp_slopes: Tensor, entropy_slopes: Tensor | None, logps: Tensor, entropies: Tensor,
    lse: Tensor, residuals: Tensor, logits: Tensor, target_ids: Tensor, temperatures: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """Write d loss / d logits (S, V) into `out`, which may be the logits themselves."""
    num_rows, num_columns = logits.shape
    if num_rows == 0:
        return
    if entropy_slopes is None:
        entropy_slopes = torch.zeros_like(logp_slopes)
    block = row_block()
    stored_gradients_kernel[(num_rows, cdiv(num_columns, block["BLOCK_V"]))](
        logits, target_ids.contiguous(), temperatures.contiguous(), logp_slopes.contiguous(),
        entropy_slopes.contiguous(),
        logps, entropies, lse, residuals, out, num_columns, logits.stride(0), out.stride(0),
        **block,
    )  # fmt: skip
