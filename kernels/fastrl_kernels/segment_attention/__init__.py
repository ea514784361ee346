"""Attention over a forest of segments: completions see their shared prompt, never each other."""

import torch
from torch import Tensor

from fastrl_kernels.implementation import choose_implementation
from fastrl_kernels.segment_attention.op import path_attention_op
from fastrl_kernels.segment_attention.reference import segment_attention_reference
from fastrl_kernels.segment_attention.sdpa import segment_attention_sdpa
from fastrl_kernels.segments import Segments

__all__ = ["segment_attention", "segment_attention_reference"]


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Causal attention of each token along the path from its root.

    q: (N, H, K), k: (N, Hkv, K), v: (N, Hkv, Kv) with H a multiple of Hkv. Returns (N, H, Kv).
    scale: factor on the scores, K ** -0.5 by default. window: see the last `window` tokens of the
    path, the token itself included. softcap: softcap * tanh(scaled score / softcap). sinks: (H,)
    logits that take part in the denominator only.

    implementation: "triton" needs a GPU, or the interpreter; it has no kernel for float32 heads
    above 128. "torch" takes one path at a time and gives a completion the same bits in any
    row. "auto" does too, but for rows of many tiny segments, where PyTorch's own attention through
    an (N, N) mask is faster and equal to rounding.
    """
    chosen = choose_implementation(implementation, q)
    has_extras = softcap is not None or sinks is not None
    _check_shapes(q, k, v, segments)
    if window is not None and window < 1:
        raise ValueError(
            f"window must be a positive number of tokens, got {window}; "
            "pass None to see the whole path"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; pass None for no cap")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device):
        raise ValueError(
            f"sinks must have one value per head, shape ({q.shape[1]},) on {q.device}, got "
            f"{tuple(sinks.shape)} on {sinks.device}; pass None for none"
        )
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if chosen == "triton" and (implementation == "triton" or not _is_too_wide(q, v)):
        from fastrl_kernels.segment_attention.triton_op import segment_attention_triton

        return segment_attention_triton(
            q, k, v, segments, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    if implementation == "auto" and not has_extras and _is_tiny(q, segments):
        return segment_attention_sdpa(q, k, v, segments, scale=scale, window=window)
    lengths, parents = segments.lengths, segments.parents
    return path_attention_op(q, k, v, sinks, lengths, parents, scale, window, softcap)


PAIRS_PER_SEGMENT = 20_000
"""Masked scores that take as long as the fixed cost of a segment, on a 2-core CPU."""


def _is_too_wide(q: Tensor, v: Tensor) -> bool:
    """Whether there is no kernel for such heads."""
    return max(q.shape[2], v.shape[2]) > (128 if q.dtype == torch.float32 else 256)


def _is_tiny(q: Tensor, segments: Segments) -> bool:
    """Whether all pairs of the row are cheaper than one segment after another."""
    num_pairs = q.shape[0] * q.shape[0] * q.shape[1]
    return num_pairs < PAIRS_PER_SEGMENT * segments.num_segments


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"q, k and v must have shape (N, heads, head size), got {shapes}; "
            "take one packed row and drop its batch dimension"
        )
    if k.shape[2] != q.shape[2] or v.shape[1] != k.shape[1]:
        raise ValueError(
            f"k must have the head size of q, and v the heads of k, got {shapes}; "
            "check the order of heads and head size"
        )
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the heads of q must be a multiple of those of k, got {q.shape[1]} and {k.shape[1]}; "
            "check the order of tokens and heads"
        )
    num_tokens = segments.num_tokens
    if not q.shape[0] == k.shape[0] == v.shape[0] == num_tokens:
        raise ValueError(
            f"q, k and v must hold the {num_tokens} tokens of segments, got {shapes}; "
            "put tokens first, and build segments from the same row"
        )
    if not q.device == k.device == v.device == segments.ends.device:
        raise ValueError(
            f"everything must be on one device, got q on {q.device}, k on {k.device}, v on "
            f"{v.device}, segments on {segments.ends.device}; use segments.to(q.device)"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype} and "
            f"{v.dtype}; cast them"
        )
