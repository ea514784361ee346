"""Segment attention inside any transformers model, through its attention interface.

Legend: N packed tokens, H heads, K head size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fastrl.errors import InputError
from fastrl.integrations.block import Block, KeepKeyValues, current_block
from fastrl.integrations.capabilities import (
    LeakError,
    check_model,
    decoder_of,
    without_wrappers,
)
from fastrl.integrations.fused_model import FusedOutput as FusedOutput
from fastrl.integrations.fused_model import fuse as fuse
from fastrl.integrations.fused_model import unfuse as unfuse
from fastrl.integrations.hybrids import calls_of_mixers, mixers_along_paths
from fastrl.integrations.last_layer import last_layer_on_rows, rows_of_last_layer
from fastrl_kernels import Segments, segment_attention

IMPLEMENTATION = "fastrl_segments"
_blocks: WeakKeyDictionary[nn.Module, Block] = WeakKeyDictionary()  # by the body of the model


@contextmanager
def segment_attention_enabled(
    model: nn.Module, rows: Tensor | None = None, *, num_tokens: int = 0,
    keep: KeepKeyValues | None = None,
) -> Iterator[None]:  # fmt: skip
    """Within the block every layer of `model` that mixes tokens follows the segments of its call.

    One that did not by the block's end has mixed them its own way, which is an error.
    rows: of `num_tokens`, ascending, those whose hidden states are wanted; the last layer then
    leaves the others out where it can, and gives zeros for them. None: all.
    keep: called with every layer of attention and its keys and values.
    """
    model = without_wrappers(model)
    check_model(model)
    assert isinstance(model, PreTrainedModel)
    with (
        attention_implementation(model, IMPLEMENTATION),
        mixers_along_paths(model),
        _recomputed_alike(model),
        _every_layer_follows(model, keep),
        nullcontext() if rows is None else last_layer_on_rows(decoder_of(model), rows, num_tokens),
    ):
        yield


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model with another function for attention within the block."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


@contextmanager
def _recomputation(model: PreTrainedModel, block: Block) -> Iterator[None]:
    token = current_block.set(block)
    try:
        with attention_implementation(model, IMPLEMENTATION), mixers_along_paths(model):
            yield
    finally:
        current_block.reset(token)


@contextmanager
def _recomputed_alike(model: PreTrainedModel) -> Iterator[None]:
    """Let checkpointed layers find the segments again when backward recomputes them.

    Backward may run after the block, when the model has its own attention back: recomputing with
    that would give wrong gradients without an error.
    """
    layers = [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    originals = [layer._gradient_checkpointing_func for layer in layers]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        block = current_block.get()  # of the forward pass that will be recomputed
        again = Block(segments=block.segments if block else None)
        return nullcontext(), _recomputation(model, again)

    for layer, original in zip(layers, originals, strict=True):
        layer._gradient_checkpointing_func = functools.partial(original, context_fn=contexts)
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer._gradient_checkpointing_func = original


@contextmanager
def _every_layer_follows(model: PreTrainedModel, keep: KeepKeyValues | None) -> Iterator[None]:
    """Refuse wrong inputs on the way in, and layers that went their own way on the way out."""
    body, block = model.base_model, Block(keep=keep)
    outer = _blocks.get(body)
    hooks = (
        body.register_forward_pre_hook(_forward_begins, with_kwargs=True),
        body.register_forward_hook(_forward_ends, always_call=True),
    )
    _blocks[body] = block
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        del _blocks[body]
        if outer is not None:
            _blocks[body] = outer
    _check_calls(model, block)


def _check_calls(model: PreTrainedModel, block: Block) -> None:
    name, config, mixers = type(model).__name__, decoder_of(model).config, calls_of_mixers(model)
    num_layers = config.num_hidden_layers
    # Layers without attention convolve, once each; some have a recurrence behind the convolution.
    num_due = {mixer: num * block.num_forwards for mixer, num in mixers.items()}
    num_attending = num_layers - max(mixers.values(), default=0)
    if len(block.windows) < num_attending * block.num_forwards or any(
        block.mixer_calls[mixer] < num for mixer, num in num_due.items()
    ):
        others = "".join(f", {block.mixer_calls[mixer]} of {mixer}" for mixer in mixers)
        raise LeakError(
            f"{name} has {num_layers} layers, but {block.num_forwards} forward passes in this "
            f"block made {len(block.windows)} calls of segment attention{others}; the other layers "
            "mix tokens in a way that may leak between completions"
        )
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        kind = "sliding" if getattr(config, "sliding_window", None) else "full"
        layer_types = [f"{kind}_attention"] * num_layers
    num_sliding = list(layer_types).count("sliding_attention")
    if sum(w is not None for w in block.windows) < num_sliding * block.num_forwards:
        raise LeakError(
            f"{name} keeps the window of its attention in a mask, which a packed row lacks; "
            "set sliding_window to null in the model's config.json if its rows are shorter"
        )


@torch.compiler.disable
def _forward_begins(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
    block = _blocks[body]
    block.num_forwards += 1
    block.segments = kwargs["segments"]
    current_block.set(block)


@torch.compiler.disable
def _forward_ends(body: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    current_block.set(None)


@torch.compiler.disable  # segments differ from row to row, and each would be compiled anew
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, segments: Segments | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (1, H, N, K), key and value (1, Hkv, N, K), as every transformers layer calls it."""
    if segments is None:
        raise LeakError(
            f"{type(module).__name__} was called without segments: its model does not pass keyword "
            "arguments down to attention; use one that does"
        )
    refuse_extras(module, attention_mask, rest)
    rows = rows_of_last_layer()
    if rows is not None:
        query, key, value = rows.all_rows(query, key, value)
    block = current_block.get()
    if block is not None:
        block.windows.append(sliding_window)
        if block.keep is not None:
            block.keep(module, key, value)
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
    return (out if rows is None else out[rows.needed])[None], None


def refuse_extras(
    module: nn.Module, attention_mask: Tensor | None, rest: Mapping[str, Any]
) -> None:
    """Raise where a layer asks attention for more than causality, a window, a cap and sinks."""
    name = type(module).__name__
    tensors = {what for what, given in rest.items() if isinstance(given, Tensor)}
    unknown = sorted(tensors - {"position_ids", "cache_position"})
    if attention_mask is not None or unknown:
        raise LeakError(
            f"{name} adds a mask or bias of its own ({', '.join(unknown) or 'attention_mask'}), "
            "which a packed row lacks"
        )
    if rest.get("dropout") or rest.get("is_causal") is False:
        raise LeakError(f"{name} asks for dropout or for attention in both directions")


AttentionInterface.register(IMPLEMENTATION, _attention)
