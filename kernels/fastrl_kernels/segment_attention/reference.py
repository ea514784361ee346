"""Attention over a forest of segments, the obvious way: through all the scores.

N packed tokens, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values.
"""

import torch
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.segments import Segments


def segment_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`segment_attention` from (H, N, N) scores, with the same arguments and shapes."""
    num_tokens, num_heads, head_size = q.shape
    num_groups = num_heads // k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    keys = k.to(dtype).repeat_interleave(num_groups, dim=1)  # (N, H, K)
    values = v.to(dtype).repeat_interleave(num_groups, dim=1)  # (N, H, Kv)

    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), keys)
    scores = scores * (head_size**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~segments.visibility(window), -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype)[:, None, None].expand(num_heads, num_tokens, 1)
        scores = torch.cat([scores, sink], dim=-1)
    # The sink takes part in the denominator and has no value.
    probs = scores.softmax(-1)[..., :num_tokens]
    return torch.einsum("hqk,khd->qhd", probs, values).to(q.dtype)
