"""`fastrl::policy_loss`, the one-pass engine as an operator: the loss comes with its gradients."""

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.chunks import Inputs
from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.head_arguments import from_arguments
from fastrl_kernels.implementation import on_device
from fastrl_kernels.linear_logps.op import NUM_TRAINABLE, check_values, grad_buffer
from fastrl_kernels.objectives.arguments import from_arguments as objective_from_arguments
from fastrl_kernels.objectives.arguments import no_gradients
from fastrl_kernels.policy_loss.one_pass import Tokens, one_pass
from fastrl_kernels.sweep import empty_gradients


@torch.library.custom_op("fastrl::policy_loss", mutates_args=())
def policy_loss_op(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    absmax: Tensor | None,
    codebook: Tensor | None,
    target_ids: Tensor,
    temperatures: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    rollout_weights: Tensor | None,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    block_size: int | None,
    num_rows: int | None,
    functions: str,
    counts: list[int],
    numbers: list[float],
    tensors: list[Tensor],
    workspace_mb: float,
    batch_invariant: bool,
    accumulate_grad: bool,
    implementation: str,
    products: str,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `PolicyLoss`, then those of `Gradients`."""
    head = from_arguments(
        hidden_states, weight, bias, lora_a, lora_b, absmax, codebook, lora_scale, logit_scale,
        softcap, vocab_size, block_size, num_rows,
    )  # fmt: skip
    check_values(target_ids, temperatures, head.num_columns)
    objective, entropy_coef = objective_from_arguments(functions, counts, numbers, tensors)
    inputs = Inputs(hidden_states, head, target_ids, temperatures)
    tokens = Tokens(advantages, token_weights, old_logps, ref_logps, rollout_weights)
    # Autocast would round the float32 operands of every product to half precision.
    with torch.autocast(hidden_states.device.type, enabled=False), on_device(hidden_states):
        if implementation == "triton":
            from fastrl_kernels.policy_loss import launch

            result, grads = launch.one_pass(
                inputs, tokens, objective, entropy_coef, needs_grad=needs_grad,
                workspace_mb=workspace_mb, products=products, batch_invariant=batch_invariant,
            )  # fmt: skip
        else:
            result, grads = one_pass(
                inputs, tokens, objective, entropy_coef, needs_grad=needs_grad,
                workspace_mb=workspace_mb, batch_invariant=batch_invariant,
            )  # fmt: skip
    return (*result, *grads)


@policy_loss_op.register_fake
def _(hidden_states: Tensor, *args: Any) -> tuple[Tensor, ...]:
    num_tokens, dtype = hidden_states.shape[0], accumulation_dtype(hidden_states.dtype)
    values = [hidden_states.new_empty(num_tokens, dtype=dtype) for _ in range(3)]
    grads = empty_gradients(hidden_states, args[:4], args[-1])
    return (
        hidden_states.new_empty((), dtype=dtype),
        *values,
        hidden_states.new_empty(num_tokens, dtype=torch.bool),
        grads[0].float() if grads[0].dtype == torch.float16 else grads[0],
        *(grad.to(dtype) for grad in grads[1:]),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.accumulates, _implementation, _products, ctx.needs_grad = inputs
    ctx.nothing = no_gradients(inputs)
    ctx.consumed = False
    # The gradients were made for the call's own flags, which autograd's own may fall short of.
    ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in inputs[:NUM_TRAINABLE]]
    ctx.weight = inputs[1] if ctx.accumulates else None
    ctx.save_for_backward(*output[5:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return tuple(ctx.nothing)
    if ctx.consumed:
        raise RuntimeError(
            "policy_loss gives its gradients once, and scales them in place; call it again, or use "
            'engine="min_memory" for a second backward through the same loss'
        )
    ctx.consumed = True
    grads = ctx.saved_tensors
    results: list[Tensor | None] = []
    for index, (grad, needed) in enumerate(zip(grads, ctx.needs_grad, strict=True)):
        if not needed:
            results.append(None)
        elif index == 1 and ctx.accumulates:
            grad_buffer(ctx.weight).addcmul_(grad, grad_loss.to(grad.dtype))
            results.append(None)
        else:
            results.append(grad.mul_(grad_loss).to(ctx.dtypes[index]))
    return (*results, *ctx.nothing[NUM_TRAINABLE:])


policy_loss_op.register_autograd(_backward, setup_context=_save_for_backward)
