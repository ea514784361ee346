"""Attention over a forest of segments: completions see their shared prompt, never each other."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastrl_kernels.segment_attention.choice import (
    IMPLEMENTATIONS,
    Choice,
    choose_attention,
    facts_of,
    obstacle_to,
)
from fastrl_kernels.segment_attention.op import path_attention_op
from fastrl_kernels.segment_attention.reference import segment_attention_reference
from fastrl_kernels.segment_attention.sdpa import segment_attention_sdpa
from fastrl_kernels.segments import Segments

__all__ = [
    "Choice",
    "choose_attention",
    "facts_of",
    "segment_attention",
    "segment_attention_reference",
]


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

    implementation: "triton" is the kernels on a GPU, or under the interpreter. "torch" takes one
    path at a time on any device. Both give a completion the same bits in any row. Three more are
    PyTorch's, equal to rounding: "sdpa" with an (N, N) mask; "flex", compiled, without gradients
    on a CPU; "varlen", calls of flash attention merged by log-sum-exp. Each raises where it cannot
    compute what is asked for. "auto" picks one, as `choose_attention` tells for `facts_of` the
    inputs, and warns where a GPU gets none of the kernels.
    """
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
    name = _choose(implementation, q, v, window, softcap, sinks)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if name == "torch":
        lengths, parents = segments.lengths, segments.parents
        return path_attention_op(q, k, v, sinks, lengths, parents, scale, window, softcap)
    if name == "sdpa":
        return segment_attention_sdpa(q, k, v, segments, scale=scale, window=window)
    return _function(name)(
        q, k, v, segments, scale=scale, window=window, softcap=softcap, sinks=sinks
    )


def _function(name: str) -> Callable[..., Tensor]:
    """Imported where it is needed: triton may be missing, and FlexAttention loads the compiler."""
    if name == "triton":
        from fastrl_kernels.segment_attention.triton_op import segment_attention_triton

        return segment_attention_triton
    if name == "flex":
        from fastrl_kernels.segment_attention.flex import segment_attention_flex

        return segment_attention_flex
    from fastrl_kernels.segment_attention.varlen import segment_attention_varlen

    return segment_attention_varlen


def _choose(
    implementation: str, q: Tensor, v: Tensor, window: int | None, softcap: float | None,
    sinks: Tensor | None,
) -> str:  # fmt: skip
    """Name of the implementation to run; a choice that cannot be met raises."""
    if implementation == "torch":
        return "torch"
    facts = facts_of(q, v, window, softcap is not None, sinks is not None)
    if implementation == "auto":
        choice = choose_attention(facts)
        if q.is_cuda and choice.name != "triton" and q.dtype != torch.float64:
            warnings.warn(f"segment attention runs as {choice.name}: {choice.reason}", stacklevel=3)
        return choice.name
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(f'"{name}"' for name in IMPLEMENTATIONS)
        raise ValueError(
            f'implementation must be "auto", {known}, got {implementation!r}; use "auto"'
        )
    obstacle = obstacle_to(implementation, facts)
    if obstacle is not None:
        raise ValueError(
            f'implementation="{implementation}" is impossible: {obstacle}; use "torch"'
        )
    is_empty = q.shape[0] == 0 and implementation != "triton"
    return "torch" if is_empty else implementation


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
