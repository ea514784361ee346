"""`segment_attention` through PyTorch's own attention and a mask, for rows short enough for it.

N packed tokens, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastrl_kernels.segments import Segments


def segment_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float, window: int | None = None
) -> Tensor:
    """`segment_attention` without softcap and sinks, from an (N, N) mask."""
    num_groups = q.shape[1] // k.shape[1]
    if q.is_cuda and num_groups > 1:
        # With a mask and heads that share keys, a GPU would hold all the scores of all heads.
        k, v = (x.repeat_interleave(num_groups, dim=1) for x in (k, v))
    # Autocast would round float32 inputs, and the result with them.
    with torch.autocast(q.device.type, enabled=False):
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],  # (1, H, N, K)
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=segments.visibility(window),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out[0].transpose(0, 1)
