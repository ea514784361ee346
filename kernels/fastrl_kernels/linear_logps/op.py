"""`fastrl::linear_logps` and the gradients of a head as operators, for torch.compile and fakes."""

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.chunks import Inputs
from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.head_arguments import NUM_TENSORS, from_arguments
from fastrl_kernels.implementation import on_device
from fastrl_kernels.linear_logps import chunked
from fastrl_kernels.sweep import TokenSlopes, empty_gradients, sweep

NUM_TRAINABLE = 5  # hidden_states, weight, bias, lora_a, lora_b: the first inputs


@torch.library.custom_op("fastrl::linear_logps", mutates_args=())
def linear_logps_op(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    absmax: Tensor | None,
    codebook: Tensor | None,
    target_ids: Tensor,
    temperatures: Tensor,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    block_size: int | None,
    num_rows: int | None,
    workspace_mb: float,
    batch_invariant: bool,
    accumulate_grad: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `LinearLogps`, and what rounding took from lse; the head in its parts."""
    head = from_arguments(
        hidden_states, weight, bias, lora_a, lora_b, absmax, codebook, lora_scale, logit_scale,
        softcap, vocab_size, block_size, num_rows,
    )  # fmt: skip
    check_values(target_ids, temperatures, head.num_columns)
    inputs = Inputs(hidden_states, head, target_ids, temperatures)
    # Autocast would round the float32 operands of every product to half precision.
    with torch.autocast(hidden_states.device.type, enabled=False), on_device(hidden_states):
        if implementation == "triton":
            from fastrl_kernels.linear_logps import launch

            return launch.forward(inputs, workspace_mb=workspace_mb)
        return chunked.forward(inputs, workspace_mb=workspace_mb, batch_invariant=batch_invariant)


@linear_logps_op.register_fake
def _(hidden_states: Tensor, *args: Any) -> tuple[Tensor, ...]:
    num_tokens, dtype = hidden_states.shape[0], accumulation_dtype(hidden_states.dtype)
    values = [hidden_states.new_empty(num_tokens, dtype=dtype) for _ in range(5)]
    argmax_ids = hidden_states.new_empty(num_tokens, dtype=torch.int64)
    return (*values, argmax_ids, torch.empty_like(values[0]))


@torch.library.custom_op("fastrl::head_gradients", mutates_args=("weight_grad",))
def head_gradients_op(
    weight_grad: Tensor | None,
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    logps: Tensor,
    entropies: Tensor,
    lse: Tensor,
    residuals: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    absmax: Tensor | None,
    codebook: Tensor | None,
    target_ids: Tensor,
    temperatures: Tensor,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    block_size: int | None,
    num_rows: int | None,
    workspace_mb: float,
    batch_invariant: bool,
    implementation: str,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Gradients`; that of the weight is added into weight_grad if that is given."""
    head = from_arguments(
        hidden_states, weight, bias, lora_a, lora_b, absmax, codebook, lora_scale, logit_scale,
        softcap, vocab_size, block_size, num_rows,
    )  # fmt: skip
    slopes = TokenSlopes(grad_logps, grad_entropies, logps, entropies, lse, residuals)
    inputs = Inputs(hidden_states, head, target_ids, temperatures)
    with torch.autocast(hidden_states.device.type, enabled=False), on_device(hidden_states):
        if implementation == "triton":
            from fastrl_kernels.linear_logps import launch_backward

            return launch_backward.backward(
                slopes, inputs, needs_grad=needs_grad, workspace_mb=workspace_mb,
                weight_grad=weight_grad,
            )  # fmt: skip
        return sweep(
            slopes,
            inputs,
            needs_grad=needs_grad,
            workspace_mb=workspace_mb,
            batch_invariant=batch_invariant,
            weight_grad=weight_grad,
        )


@head_gradients_op.register_fake
def _(weight_grad: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(args[6], args[7:11], args[-1], weight_grad is None)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    num_tensors = 1 + NUM_TENSORS + 2
    tensors, (*ctx.constants, ctx.accumulates, implementation) = (
        inputs[:num_tensors],
        inputs[num_tensors:],
    )
    ctx.constants.append(implementation)
    # Not the saved tensor: a checkpoint gives back another one, whose .grad nobody reads.
    ctx.weight = inputs[1] if ctx.accumulates else None
    ctx.save_for_backward(output[0], output[1], output[2], output[6], *tensors)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logps: Any, grad_entropies: Any, *_: Any) -> tuple[Any, ...]:
    needs_grad = list(ctx.needs_input_grad[:NUM_TRAINABLE])
    num_inputs = 1 + NUM_TENSORS + 2 + len(ctx.constants) + 1
    if grad_logps is None and grad_entropies is None:
        return (None,) * num_inputs
    logps, entropies, lse, residuals, *tensors = ctx.saved_tensors
    into = grad_buffer(ctx.weight) if ctx.accumulates and needs_grad[1] else None
    grads = head_gradients_op(
        into, torch.zeros_like(logps) if grad_logps is None else grad_logps, grad_entropies,
        logps, entropies, lse, residuals, *tensors, *ctx.constants, needs_grad,
    )  # fmt: skip
    needs_grad[1] = needs_grad[1] and into is None
    wanted = (grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True))
    return (*wanted, *[None] * (num_inputs - NUM_TRAINABLE))


def grad_buffer(weight: Tensor) -> Tensor:
    """`weight.grad`, made if it is not there."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


linear_logps_op.register_autograd(_backward, setup_context=_save_for_backward)


def check_values(target_ids: Tensor, temperatures: Tensor, vocab_size: int) -> None:
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
