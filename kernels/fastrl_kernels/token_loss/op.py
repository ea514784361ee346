"""`fastrl::token_loss`: the loss, its slopes and its metrics, in one launch on a GPU."""

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.implementation import on_device
from fastrl_kernels.objectives import Objective, function_of
from fastrl_kernels.token_loss.reference import token_loss_reference

NUM_SUMS = 7  # loss, tokens, clipped high, clipped low, entropy, KL to old, KL to reference
BLOCK = 1024


@torch.library.custom_op("fastrl::token_loss", mutates_args=())
def token_loss_op(
    logps: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    rollout_weights: Tensor | None,
    surrogate: str,
    hyper_parameters: list[float],
    regulariser: str | None,
    beta: float,
    entropy_coef: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, slopes of logps and of entropies, clipped, and the five metrics as one tensor."""
    penalty = None if regulariser is None else function_of(regulariser)
    objective = Objective(function_of(surrogate), tuple(hyper_parameters), penalty, beta)
    tensors = (logps, entropies, advantages, token_weights)
    others = (old_logps, ref_logps, rollout_weights)
    if implementation == "triton":
        with on_device(logps):
            return _launch(*tensors, *others, objective, entropy_coef)
    old_logps, ref_logps, rollout_weights = others
    out = token_loss_reference(
        *tensors, objective=objective, old_logps=old_logps, ref_logps=ref_logps,
        rollout_weights=rollout_weights, entropy_coef=entropy_coef,
    )  # fmt: skip
    metrics = torch.stack([value.to(logps.dtype) for value in out[3:]])
    return out.loss, out.slopes, -entropy_coef * token_weights, out.clipped, metrics


@token_loss_op.register_fake
def _(logps: Tensor, *args: Any) -> tuple[Tensor, ...]:
    slopes, entropy_slopes = torch.empty_like(logps), torch.empty_like(logps)
    clipped = torch.empty_like(logps, dtype=torch.bool)
    return logps.new_empty(()), slopes, entropy_slopes, clipped, logps.new_empty(5)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    slopes, entropy_slopes = ctx.saved_tensors
    return (grad_loss * slopes, grad_loss * entropy_slopes, *[None] * (ctx.num_inputs - 2))


token_loss_op.register_autograd(_backward, setup_context=_save_for_backward)


def _launch(
    logps: Tensor, entropies: Tensor, advantages: Tensor, token_weights: Tensor,
    old_logps: Tensor | None, ref_logps: Tensor | None, rollout_weights: Tensor | None,
    objective: Objective, entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastrl_kernels.launch import kernel_function
    from fastrl_kernels.token_loss.kernel import token_losses_kernel

    slopes, entropy_slopes = torch.empty_like(logps), torch.empty_like(logps)
    clipped = torch.empty_like(logps, dtype=torch.bool)
    sums = logps.new_empty(NUM_SUMS)
    regulariser = objective.regulariser if objective.is_regularised else None
    token_losses_kernel[(1,)](
        logps, entropies, old_logps, ref_logps, rollout_weights, advantages, token_weights, slopes,
        entropy_slopes, clipped, sums, tuple(float(x) for x in objective.hyper_parameters),
        float(objective.beta), float(entropy_coef), logps.shape[0],
        SURROGATE=kernel_function(objective.surrogate),
        REGULARISER=None if regulariser is None else kernel_function(regulariser),
        HAS_OLD=old_logps is not None, HAS_REF=ref_logps is not None,
        HAS_ROLLOUT=rollout_weights is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return sums[0].clone(), slopes, entropy_slopes, clipped, sums[2:] / sums[1].clamp(min=1)
