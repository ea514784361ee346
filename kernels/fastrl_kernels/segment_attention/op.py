"""`fastrl::path_attention` and its gradients as operators, for torch.compile and fakes.

N packed tokens, M segments, H heads, Hkv key-value heads, K head size of queries and keys, Kv of
values.
"""

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.segment_attention import paths
from fastrl_kernels.segment_attention.paths import tables_of
from fastrl_kernels.segment_attention.scores import Options

NUM_INPUTS = 9


@torch.library.custom_op("fastrl::path_attention", mutates_args=())
def path_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    lengths: Tensor,
    parents: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """(N, H, Kv) outputs, for the forest of these (M,) lengths and parents."""
    # Autocast would round the float32 operands of every product to half precision.
    with torch.autocast(q.device.type, enabled=False):
        tables = tables_of(lengths, parents, q.shape[1], q.device)
        return paths.forward(q, k, v, sinks, tables, Options(scale, window, softcap))


@path_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2])


@torch.library.custom_op("fastrl::path_attention_gradients", mutates_args=())
def path_attention_gradients_op(
    grad_out: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    lengths: Tensor,
    parents: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks, the last one empty if there are none."""
    with torch.autocast(q.device.type, enabled=False):
        tables = tables_of(lengths, parents, q.shape[1], q.device)
        options = Options(scale, window, softcap)
        return paths.backward(grad_out, out, q, k, v, sinks, tables, options)


@path_attention_gradients_op.register_fake
def _(
    grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype) if sinks is None else sinks.dtype
    sinks_grad = q.new_empty(0 if sinks is None else q.shape[1], dtype=dtype)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), sinks_grad


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    grads = path_attention_gradients_op(grad_out, *ctx.saved_tensors, *ctx.options)
    wanted = (
        grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)
    )
    return (*wanted, *[None] * (NUM_INPUTS - len(grads)))


path_attention_op.register_autograd(_backward, setup_context=_save_for_backward)
