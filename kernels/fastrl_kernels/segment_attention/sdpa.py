"""`segment_attention` in PyTorch: its fused attention, or explicit scores where that lacks a part.

N packed tokens, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastrl_kernels.segment_attention.reference import segment_attention_reference
from fastrl_kernels.segments import Segments


def segment_attention_sdpa(
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
    """`segment_attention`; with a softcap or sinks it holds (H, N, N) scores."""
    if softcap is not None or sinks is not None:
        return segment_attention_reference(
            q, k, v, segments, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # (1, H, N, K)
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=segments.visibility(window),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)
