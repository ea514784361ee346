"""`fastrl::linear_logps` and its backward as operators, for torch.compile and fake tensors."""

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.head import LMHead, accumulation_dtype
from fastrl_kernels.linear_logps import chunked


@torch.library.custom_op("fastrl::linear_logps", mutates_args=())
def linear_logps_op(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target_ids: Tensor,
    temperatures: Tensor,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    workspace_mb: float,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `LinearLogps`; the parts of the head come one by one."""
    head = LMHead(weight, bias, lora_a, lora_b, lora_scale, logit_scale, softcap, vocab_size)
    _check_values(target_ids, temperatures, head.num_columns)
    # Autocast would round the float32 operands of every product to half precision.
    with torch.autocast(hidden_states.device.type, enabled=False):
        return chunked.forward(
            hidden_states,
            head,
            target_ids,
            temperatures,
            workspace_mb=workspace_mb,
            batch_invariant=batch_invariant,
        )


@linear_logps_op.register_fake
def _(hidden_states: Tensor, *args: Any) -> tuple[Tensor, ...]:
    num_tokens, dtype = hidden_states.shape[0], accumulation_dtype(hidden_states.dtype)
    values = [hidden_states.new_empty(num_tokens, dtype=dtype) for _ in range(5)]
    return (*values, hidden_states.new_empty(num_tokens, dtype=torch.int64))


@torch.library.custom_op("fastrl::linear_logps_backward", mutates_args=())
def linear_logps_backward_op(
    grad_logps: Tensor,
    grad_entropies: Tensor,
    entropies: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target_ids: Tensor,
    temperatures: Tensor,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    workspace_mb: float,
    batch_invariant: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Gradients`."""
    head = LMHead(weight, bias, lora_a, lora_b, lora_scale, logit_scale, softcap, vocab_size)
    with torch.autocast(hidden_states.device.type, enabled=False):
        return chunked.backward(
            grad_logps,
            grad_entropies,
            entropies,
            hidden_states,
            head,
            target_ids,
            temperatures,
            needs_grad=needs_grad,
            workspace_mb=workspace_mb,
            batch_invariant=batch_invariant,
        )


@linear_logps_backward_op.register_fake
def _(
    grad_logps: Tensor,
    grad_entropies: Tensor,
    entropies: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    inputs = (hidden_states, weight, bias, lora_a, lora_b)
    return tuple(
        torch.empty_like(tensor) if tensor is not None and needed else hidden_states.new_empty(0)
        for tensor, needed in zip(inputs, args[-1], strict=True)
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.constants = inputs[:7], inputs[7:]
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grad_logps: Tensor, grad_entropies: Tensor, *_: Any) -> tuple[Any, ...]:
    needs_grad = list(ctx.needs_input_grad[:5])
    grads = linear_logps_backward_op(
        grad_logps, grad_entropies, *ctx.saved_tensors, *ctx.constants, needs_grad
    )
    wanted = (grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True))
    return (*wanted, *[None] * 8)


linear_logps_op.register_autograd(_backward, setup_context=_save_for_backward)


def _check_values(target_ids: Tensor, temperatures: Tensor, vocab_size: int) -> None:
    """Raise ValueError for values out of range; a GPU would have to be waited for, so not there."""
    if target_ids.is_cuda or not target_ids.numel():
        return
    largest, coldest = int(target_ids.max()), float(temperatures.min())
    if largest >= vocab_size:
        raise ValueError(
            f"target_ids must be below the vocabulary size {vocab_size}, got {largest}; "
            "mark rows without a target with a negative id"
        )
    if not coldest > 0:
        raise ValueError(f"temperature must be positive in every row, got {coldest}; raise it")
