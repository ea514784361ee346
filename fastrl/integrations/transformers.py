"""Segment attention inside any transformers model, through its attention interface.

Legend: N packed tokens, H heads, K head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fastrl.errors import InputError
from fastrl_kernels import Segments, segment_attention

IMPLEMENTATION = "fastrl_segments"
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass
class _Seen:
    """What has come by within a block, recomputed layers left out."""

    num_forwards: int = 0
    windows: list[int | None] = field(default_factory=list)  # one a call of attention


_seen: ContextVar[_Seen | None] = ContextVar("seen", default=None)


@contextmanager
def segment_attention_enabled(model: nn.Module) -> Iterator[None]:
    """Within the block every attention layer of `model` follows the segments it is called with.

    A layer that reached no attention by its end has mixed tokens its own way, which is an error.
    """
    model = _without_wrappers(model)
    check_model(model)
    assert isinstance(model, PreTrainedModel)
    with (
        _attention_implementation(model),
        _recomputed_alike(model),
        _every_layer_attends(model),
    ):
        yield


@contextmanager
def _attention_implementation(model: PreTrainedModel) -> Iterator[None]:
    previous = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


@contextmanager
def _recomputation(model: PreTrainedModel) -> Iterator[None]:
    token = _seen.set(None)
    try:
        with _attention_implementation(model):
            yield
    finally:
        _seen.reset(token)


@contextmanager
def _recomputed_alike(model: PreTrainedModel) -> Iterator[None]:
    """Let checkpointed layers find segment attention again when backward recomputes them.

    Backward may run after the block, when the model has its own attention back: recomputing with
    that would give wrong gradients without an error.
    """
    layers = [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    originals = [layer._gradient_checkpointing_func for layer in layers]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _recomputation(model)

    for layer, original in zip(layers, originals, strict=True):
        layer._gradient_checkpointing_func = functools.partial(original, context_fn=contexts)
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer._gradient_checkpointing_func = original


@contextmanager
def _every_layer_attends(model: PreTrainedModel) -> Iterator[None]:
    """Refuse wrong inputs on the way in, and layers that went their own way on the way out."""
    hook = model.base_model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
    seen = _Seen()
    token = _seen.set(seen)
    try:
        yield
    finally:
        _seen.reset(token)
        hook.remove()
    _check_calls(type(model).__name__, _decoder(model).config, seen)


def _check_calls(name: str, config: Any, seen: _Seen) -> None:
    num_layers = config.num_hidden_layers
    if len(seen.windows) < num_layers * seen.num_forwards:
        raise RuntimeError(
            f"{name} has {num_layers} layers, but {seen.num_forwards} forward passes in this block "
            f"made {len(seen.windows)} calls of segment attention; the other layers mix tokens in "
            "a way that may leak between completions"
        )
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        kind = "sliding" if getattr(config, "sliding_window", None) else "full"
        layer_types = [f"{kind}_attention"] * num_layers
    num_sliding = list(layer_types).count("sliding_attention")
    if sum(w is not None for w in seen.windows) < num_sliding * seen.num_forwards:
        raise RuntimeError(
            f"{name} keeps the window of its attention in a mask, which a packed row lacks; "
            "set sliding_window to null in the model's config.json if its rows are shorter"
        )


@torch.compiler.disable
def _check_inputs(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = type(body).__name__
    if kwargs.get("segments") is None:
        raise RuntimeError(
            f"{name} was called without segments; call the model with **plan.inputs, and outside "
            "of the block for anything else"
        )
    if kwargs.get("position_ids") is None:
        raise InputError(f"{name} was called without position_ids; call it with **plan.inputs")
    for given in ("attention_mask", "past_key_values"):
        if kwargs.get(given) is not None:
            raise InputError(
                f"{name} was called with {given}, which a plan replaces; pass **plan.inputs alone"
            )
    seen = _seen.get()
    assert seen is not None
    seen.num_forwards += 1


def _without_wrappers(model: Any) -> nn.Module:
    """The transformers model inside of torch.compile's and PEFT's wrappers."""
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise InputError("a prompt learnt by PEFT is no part of a plan; merge it or use LoRA")
    return model.get_base_model()


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of the model that reads text."""
    decoder = model.get_decoder()  # some call their head so
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def check_model(model: nn.Module) -> None:
    """Refuse a model in which completions that share a prompt would see each other.

    Convolutions and recurrent states carry information along the packed row, what lives in a mask
    alone is not in the plan, and dropout would be drawn once for a shared prompt. What can only be
    seen while the model runs is checked by `segment_attention_enabled`.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not type(model)._can_set_attn_implementation():
        raise InputError(
            f"expected a transformers model that uses the attention interface, got {name}"
        )
    decoder = _decoder(model)
    _check_config(name, decoder.config)
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise InputError(
            f"{name} takes no position_ids, so a completion could not continue its prompt's"
        )
    for path, module in decoder.named_modules():
        _check_module(name, path, module)


def _check_config(name: str, config: Any) -> None:
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
    if getattr(config, "is_causal", True) is False:
        raise InputError(f"{name} attends in both directions, so completions would see each other")


def _check_module(name: str, path: str, module: nn.Module) -> None:
    if isinstance(module, nn.Conv1d):
        raise InputError(f"{name} has a convolution at {path}, which leaks between completions")
    if getattr(module, "is_causal", True) is False:
        raise InputError(f"{name} attends in both directions at {path}; only causal models work")
    chances = {"dropout": module.p} if isinstance(module, nn.Dropout) else vars(module)
    for what, chance in chances.items():
        is_random = "drop" in what or "jitter" in what
        if module.training and is_random and isinstance(chance, float) and chance > 0.0:
            raise InputError(
                f"{name} has {what} {chance} at {path or 'the top'}, drawn once for a shared "
                "prompt; set it to 0 in the model's config.json"
            )


@torch.compiler.disable  # segments differ from row to row, and each would be compiled anew
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, segments: Segments | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (1, H, N, K), key and value (1, Hkv, N, K), as every transformers layer calls it."""
    name = type(module).__name__
    if segments is None:
        raise RuntimeError(
            f"{name} was called without segments: its model does not pass keyword "
            "arguments down to attention; use one that does"
        )
    tensors = {what for what, given in rest.items() if isinstance(given, Tensor)}
    unknown = sorted(tensors - {"position_ids", "cache_position"})
    if attention_mask is not None or unknown:
        raise RuntimeError(
            f"{name} adds a mask or bias of its own ({', '.join(unknown) or 'attention_mask'}), "
            "which a packed row lacks"
        )
    if rest.get("dropout") or rest.get("is_causal") is False:
        raise RuntimeError(f"{name} asks for dropout or for attention in both directions")
    seen = _seen.get()
    if seen is not None:
        seen.windows.append(sliding_window)
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
