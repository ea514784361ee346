"""`fastrl::token_loss`: the loss, its slopes and its metrics, in one launch on a GPU."""

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.implementation import on_device
from fastrl_kernels.objectives import Objective, Parameter
from fastrl_kernels.objectives.arguments import from_arguments, no_gradients
from fastrl_kernels.token_loss.reference import TokenLoss, token_loss_reference

NUM_METRICS = len(TokenLoss._fields) - 3
NUM_SUMS = NUM_METRICS + 2  # of tokens and loss too; two make the last metric, one is a maximum
BLOCK = 512
NUM_WARPS = 4


@torch.library.custom_op("fastrl::token_loss", mutates_args=())
def token_loss_op(
    logps: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    rollout_weights: Tensor | None,
    functions: str,
    counts: list[int],
    numbers: list[float],
    tensors: list[Tensor],
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, slopes of logps and of entropies, clipped, and the metrics as one tensor."""
    objective, entropy_coef = from_arguments(functions, counts, numbers, tensors)
    given = (logps, entropies, advantages, token_weights)
    others = (old_logps, ref_logps, rollout_weights)
    if implementation == "triton":
        with on_device(logps):
            return _launch(*given, *others, objective, entropy_coef)
    out = token_loss_reference(
        *given, objective=objective, old_logps=old_logps, ref_logps=ref_logps,
        rollout_weights=rollout_weights, entropy_coef=entropy_coef,
    )  # fmt: skip
    return out.loss, out.slopes, -entropy_coef * token_weights, out.clipped, torch.stack(out[3:])


@token_loss_op.register_fake
def _(logps: Tensor, *args: Any) -> tuple[Tensor, ...]:
    slopes, entropy_slopes = torch.empty_like(logps), torch.empty_like(logps)
    clipped = torch.empty_like(logps, dtype=torch.bool)
    return logps.new_empty(()), slopes, entropy_slopes, clipped, logps.new_empty(NUM_METRICS)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.constants = no_gradients(inputs[2:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    slopes, entropy_slopes = ctx.saved_tensors
    return (grad_loss * slopes, grad_loss * entropy_slopes, *ctx.constants)


token_loss_op.register_autograd(_backward, setup_context=_save_for_backward)


def _launch(
    logps: Tensor, entropies: Tensor, advantages: Tensor, token_weights: Tensor,
    old_logps: Tensor | None, ref_logps: Tensor | None, rollout_weights: Tensor | None,
    objective: Objective, entropy_coef: Parameter,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastrl_kernels.launch import objective_arguments
    from fastrl_kernels.token_loss.kernel import token_losses_kernel

    slopes, entropy_slopes = torch.empty_like(logps), torch.empty_like(logps)
    clipped = torch.empty_like(logps, dtype=torch.bool)
    loss, metrics = logps.new_empty(()), logps.new_empty(NUM_METRICS)
    parameters, constants = objective_arguments(objective, entropy_coef, logps.shape[0])
    token_losses_kernel[(1,)](
        logps, entropies, old_logps, ref_logps, rollout_weights, advantages, token_weights, slopes,
        entropy_slopes, clipped, loss, metrics, parameters, logps.shape[0], **constants,
        HAS_OLD=old_logps is not None, HAS_REF=ref_logps is not None,
        HAS_ROLLOUT=rollout_weights is not None, BLOCK=BLOCK, NUM_SUMS=NUM_SUMS,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return loss, slopes, entropy_slopes, clipped, metrics
