"""Logits of a few rows in full, for whoever samples from them.

Legend: R rows, D hidden, V vocabulary.
"""

import contextlib

import torch
from torch import Tensor

from fastrl_kernels.chunks import Chunk, write_logits
from fastrl_kernels.chunks import low_rank as adapted
from fastrl_kernels.head import LMHead, accumulation_dtype, as_lm_head, check_head


@torch.no_grad()
def head_logits(
    hidden_states: Tensor, lm_head: LMHead | Tensor, *, temperature: float = 1.0
) -> Tensor:
    """(R, V) logits over temperature, with the products and dtype of `linear_logps`.

    hidden_states: (R, D). fp32 (fp64 for fp64) whatever the dtype of the operands, never rounded to
    half precision; columns that are padding of the vocabulary are left out. No gradient. Meant for
    the few rows of a decoding step: R * V values are stored.
    """
    head = as_lm_head(lm_head)
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states must be (R, D), got {tuple(hidden_states.shape)}")
    check_head(head, hidden_states.shape[1])
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    num_rows = hidden_states.shape[0]
    row_ids = torch.arange(num_rows, device=hidden_states.device)
    dtype = accumulation_dtype(hidden_states.dtype)
    chunk = Chunk(
        row_ids=row_ids,
        num_rows=num_rows,
        hidden_states=hidden_states,
        target_ids=row_ids,
        temperatures=torch.full((), temperature, dtype=dtype, device=hidden_states.device),
        ignored=row_ids,
    )
    out = hidden_states.new_empty(num_rows, head.num_columns, dtype=dtype)
    columns = slice(0, head.num_columns)
    with _full_precision(hidden_states.device.type):
        write_logits(out, chunk, head, columns, adapted(chunk, head, padded=False), padded=False)
    return out


def _full_precision(device: str) -> contextlib.AbstractContextManager[object]:
    """No autocast within, on devices that have it."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
