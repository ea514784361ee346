"""`segment_attention` by the kernels, and its gradients, as operators that torch.compile knows."""

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.implementation import on_device
from fastrl_kernels.segment_attention import launch
from fastrl_kernels.segment_attention.launch import Options
from fastrl_kernels.segment_attention.reference import segment_attention_reference
from fastrl_kernels.segment_attention.tiles import Tiles
from fastrl_kernels.segments import Segments

NUM_TRAINABLE = 4  # q, k, v, sinks: the first inputs


def segment_attention_triton(
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
    """`segment_attention` by the kernels: heads of at most 256, in float32 of 128."""
    if not q.numel():  # no tile to launch anything for
        return segment_attention_reference(q, k, v, segments, window=window, sinks=sinks)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    tiles = launch.attention_tiles(q, k, v, segments, window)
    out, _ = segment_attention_op(q, k, v, sinks, *tiles, scale, window, softcap)
    return out


@torch.library.custom_op("fastrl::segment_attention_triton", mutates_args=())
def segment_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    paths: Tensor,
    query_tiles: Tensor,
    key_units: Tensor,
    key_splits: Tensor,
    positions: Tensor,
    num_slots: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; the tables are the fields of `Tiles`."""
    tiles = Tiles(paths, query_tiles, key_units, key_splits, positions, num_slots)
    with on_device(q):
        return launch.forward(q, k, v, sinks, tiles, Options(scale, window, softcap))


@segment_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, _ = q.shape
    out = q.new_empty(num_tokens, num_heads, v.shape[2])
    return out, q.new_empty(num_heads, num_tokens, dtype=torch.float32)


@torch.library.custom_op("fastrl::segment_attention_triton_gradients", mutates_args=())
def segment_attention_gradients_op(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    paths: Tensor,
    query_tiles: Tensor,
    key_units: Tensor,
    key_splits: Tensor,
    positions: Tensor,
    num_slots: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks, the last one empty without sinks."""
    tiles = Tiles(paths, query_tiles, key_units, key_splits, positions, num_slots)
    options = Options(scale, window, softcap)
    with on_device(q):
        dq, dk, dv, dsinks = launch.backward(grad, q, k, v, sinks, out, lse, tiles, options)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@segment_attention_gradients_op.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    q, k, v, sinks = args[:NUM_TRAINABLE]
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    num_tensors = NUM_TRAINABLE + len(Tiles._fields) - 1
    ctx.save_for_backward(*output, *inputs[:num_tensors])
    ctx.constants = inputs[num_tensors:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Any, _: Any) -> tuple[Any, ...]:
    rest = len(Tiles._fields) + len(Options._fields)
    if grad is None:
        return (None,) * (NUM_TRAINABLE + rest)
    *gradients, dsinks = segment_attention_gradients_op(grad, *ctx.saved_tensors, *ctx.constants)
    return (*gradients, dsinks if ctx.needs_input_grad[3] else None, *[None] * rest)


segment_attention_op.register_autograd(_backward, setup_context=_save_for_backward)
