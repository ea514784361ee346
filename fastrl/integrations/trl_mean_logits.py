"""Mean over the vocabulary of a token's logits, which TRL logs for chosen and rejected answers.

Legend: S tokens, D hidden, V vocabulary without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl_kernels import LMHead
from fastrl_kernels.batches import sum_of_rows
from fastrl_kernels.head import accumulation_dtype, weight_rows

MIB = 2**20


@torch.no_grad()
def mean_logits(
    hidden_states: Tensor, lm_head: LMHead, *, temperature: float, workspace_mb: float
) -> Tensor:
    """(S,) means of logits / temperature, in float32 (float64 for float64).

    Logits are linear in the hidden states unless they are capped, so that the mean logit is that of
    the head's mean row. With a softcap all logits are made, some columns at a time.
    """
    dtype, num_columns = accumulation_dtype(hidden_states.dtype), lm_head.num_columns
    hidden = hidden_states.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if lm_head.softcap is None:
            row, shift = sum_of_rows(lm_head, dtype)
            total = (hidden @ row + shift) * lm_head.logit_scale
        else:
            budget = int(workspace_mb * MIB) // dtype.itemsize
            step = max(1, budget // (2 * max(1, sum(hidden.shape))))
            total = hidden.new_zeros(hidden.shape[0])
            for start in range(0, num_columns, step):
                columns = slice(start, min(start + step, num_columns))
                total += _capped_logits(hidden, lm_head, columns).sum(1)
    return total / (num_columns * temperature)


def _capped_logits(hidden: Tensor, head: LMHead, columns: slice) -> Tensor:
    """(S, columns) logits before the temperature."""
    assert head.softcap is not None
    logits = hidden @ weight_rows(head, columns).to(hidden.dtype).T
    if head.lora_a is not None and head.lora_b is not None:
        low_rank = hidden @ head.lora_a.to(hidden.dtype).T
        logits += head.lora_scale * (low_rank @ head.lora_b[columns].to(hidden.dtype).T)
    if head.bias is not None:
        logits += head.bias[columns].to(hidden.dtype)
    return head.softcap * torch.tanh(logits * (head.logit_scale / head.softcap))
