"""Attention of one new token a sequence, the obvious way: every row with its own copy of all keys.

R rows, P groups, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values, L
prefix columns, C suffix columns.
"""

import torch
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype


def decode_attention_reference(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    *,
    row_groups: Tensor,
    prefix_lengths: Tensor,
    suffix_length: int | Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`decode_attention` from (R, H, L + C) scores, with the same arguments and shapes."""
    num_rows, num_heads, head_size = q.shape
    dtype, rows, num_shared = accumulation_dtype(q.dtype), row_groups.long(), prefix_k.shape[2]
    visible = _visible(prefix_lengths[rows], int(suffix_length), num_shared, suffix_k.shape[2])
    if window is not None:
        # Columns are in the order of positions, so the window is the last ones that are visible.
        visible &= visible.flip(1).cumsum(1).flip(1) <= window
    num_sharing = num_heads // suffix_k.shape[1]
    keys, values = (
        torch.cat([prefix[rows], suffix], 2).to(dtype).repeat_interleave(num_sharing, 1)
        for prefix, suffix in ((prefix_k, suffix_k), (prefix_v, suffix_v))
    )  # (R, H, L + C, K) and (R, H, L + C, Kv)

    scores = torch.einsum("rhd,rhcd->rhc", q.to(dtype), keys)
    scores = scores * (head_size**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None].expand(num_rows, -1, 1)], -1)
    # The sink takes part in the denominator and has no value.
    probs = scores.softmax(-1)[..., : visible.shape[1]]
    values = values.masked_fill(~visible[:, None, :, None], 0)  # 0 times NaN would be NaN
    return torch.einsum("rhc,rhcd->rhd", probs, values).to(q.dtype)


def _visible(lengths: Tensor, suffix_length: int, num_shared: int, num_own: int) -> Tensor:
    """(R, L + C) bool: columns that hold a token of the row."""
    shared = torch.arange(num_shared, device=lengths.device) < lengths[:, None]
    own = torch.arange(num_own, device=lengths.device) < suffix_length
    return torch.cat([shared, own.expand(len(lengths), -1)], 1)
