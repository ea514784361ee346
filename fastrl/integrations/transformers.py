"""Segment attention inside any transformers model, through its attention interface.

Legend: N packed tokens, H heads, K head size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fastrl.errors import InputError
from fastrl_kernels import Segments, segment_attention

IMPLEMENTATION = "fastrl_segments"
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@contextmanager
def segment_attention_enabled(model: nn.Module, segments: Segments) -> Iterator[None]:
    """Within the block every attention layer of `model` follows the segments it is called with.

    `segments`: those of the block's plan, whose masks are freed at its end.
    """
    check_model(model)
    assert isinstance(model, PreTrainedModel)
    with _attention_implementation(model, segments), _recomputed_alike(model, segments):
        yield


@contextmanager
def _attention_implementation(model: PreTrainedModel, segments: Segments) -> Iterator[None]:
    previous = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
        segments.forget_masks()


@contextmanager
def _recomputed_alike(model: PreTrainedModel, segments: Segments) -> Iterator[None]:
    """Let checkpointed layers find segment attention again when backward recomputes them.

    Backward may run after the block, when the model has its own attention back: recomputing with
    that would give wrong gradients without an error.
    """
    layers = [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    originals = [layer._gradient_checkpointing_func for layer in layers]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _attention_implementation(model, segments)

    for layer, original in zip(layers, originals, strict=True):
        layer._gradient_checkpointing_func = functools.partial(original, context_fn=contexts)
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer._gradient_checkpointing_func = original


def check_model(model: nn.Module) -> None:
    """Refuse a model in which completions that share a prompt would see each other.

    Convolutions and recurrent states carry information along the packed row, chunked attention
    lives in a mask that the plan does not have, and dropout would be drawn once for a shared
    prompt.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not type(model)._can_set_attn_implementation():
        raise InputError(
            f"expected a transformers model that uses the attention interface, got {name}"
        )
    config = model.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
    if unknown:
        raise InputError(f"{name} has layers of type {sorted(unknown)}; only attention works")
    if getattr(config, "attention_chunk_size", None):
        raise InputError(f"{name} uses chunked attention, which packed prefixes do not support")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {
        str(entry.get("rope_type")) for entry in (rope, *rope.values()) if isinstance(entry, dict)
    }
    if kinds & LENGTH_DEPENDENT_ROPE:
        raise InputError(
            f"{name} has rotary embeddings that depend on the longest sequence "
            f"({sorted(kinds & LENGTH_DEPENDENT_ROPE)}); packed rows would change them"
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            raise InputError(f"{name} has a convolution at {path}, which leaks between completions")
        dropout = module.p if isinstance(module, nn.Dropout) else 0.0
        dropout = max(dropout, getattr(module, "attention_dropout", 0.0) or 0.0)
        if module.training and dropout > 0.0:
            raise InputError(
                f"{name} has dropout {dropout} at {path}; set it to 0 in the model's config.json"
            )


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, segments: Segments | None = None, **ignored: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (1, H, N, K), key and value (1, Hkv, N, K), as every transformers layer calls it."""
    if segments is None:
        raise RuntimeError(
            f"{type(module).__name__} was called without segments: its model does not pass keyword "
            "arguments down to attention; use one that does"
        )
    if attention_mask is not None or ignored.get("position_bias") is not None:
        raise RuntimeError(
            f"{type(module).__name__} adds a mask or bias of its own, which a packed row lacks"
        )
    out = segment_attention(
        query[0].transpose(0, 1).to(value.dtype),  # autocast leaves rotated queries in float32
        key[0].transpose(0, 1).to(value.dtype),
        value[0].transpose(0, 1),
        segments,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, _attention)
