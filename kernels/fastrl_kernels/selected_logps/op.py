"""`fastrl::selected_logps` and its two backwards, for torch.compile and fake tensors."""

from typing import Any

import torch
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.implementation import on_device
from fastrl_kernels.linear_logps.op import check_values
from fastrl_kernels.selected_logps import chunked


@torch.library.custom_op("fastrl::selected_logps", mutates_args=())
def selected_logps_op(
    logits: Tensor, target_ids: Tensor, temperatures: Tensor, inplace_backward: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of `LinearLogps`, and what rounding took from lse."""
    check_values(target_ids, temperatures, logits.shape[1])
    if implementation == "triton":
        from fastrl_kernels.selected_logps import launch

        with on_device(logits):
            return launch.forward(logits, target_ids, temperatures)
    return chunked.forward(logits, target_ids, temperatures)


@selected_logps_op.register_fake
def _(logits: Tensor, target_ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(logits.dtype)
    values = [logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(5)]
    return (*values, torch.empty_like(target_ids), torch.empty_like(values[0]))


@torch.library.custom_op("fastrl::selected_logps_backward", mutates_args=("out",))
def selected_logps_backward_op(
    out: Tensor, grad_logps: Tensor, grad_entropies: Tensor | None, logps: Tensor,
    entropies: Tensor, lse: Tensor, residuals: Tensor, logits: Tensor, target_ids: Tensor,
    temperatures: Tensor, implementation: str,
) -> None:  # fmt: skip
    """Write the gradient of the logits into `out`."""
    _write_gradients(
        out, grad_logps, grad_entropies, logps, entropies, lse, residuals, logits, target_ids,
        temperatures,
        implementation,
    )  # fmt: skip


@torch.library.custom_op("fastrl::selected_logps_backward_", mutates_args=("logits",))
def selected_logps_inplace_backward_op(
    logits: Tensor, grad_logps: Tensor, grad_entropies: Tensor | None, logps: Tensor,
    entropies: Tensor, lse: Tensor, residuals: Tensor, target_ids: Tensor, temperatures: Tensor,
    implementation: str,
) -> None:  # fmt: skip
    """Replace the logits by their gradient."""
    _write_gradients(
        logits, grad_logps, grad_entropies, logps, entropies, lse, residuals, logits, target_ids,
        temperatures,
        implementation,
    )  # fmt: skip


def _write_gradients(
    out: Tensor, grad_logps: Tensor, grad_entropies: Tensor | None, logps: Tensor,
    entropies: Tensor, lse: Tensor, residuals: Tensor, logits: Tensor, target_ids: Tensor,
    temperatures: Tensor, implementation: str,
) -> None:  # fmt: skip
    arguments = (
        grad_logps,
        grad_entropies,
        logps,
        entropies,
        lse,
        residuals,
        logits,
        target_ids,
        temperatures,
        out,
    )
    if implementation == "triton":
        from fastrl_kernels.selected_logps import launch

        with on_device(logits):
            launch.backward(*arguments)
    else:
        chunked.backward(*arguments)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target_ids, temperatures, ctx.is_inplace, ctx.implementation = inputs
    saved = (output[0], output[1], output[2], output[6])
    ctx.save_for_backward(*saved, logits, target_ids, temperatures)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logps: Any, grad_entropies: Any, *_: Any) -> tuple[Any, ...]:
    if grad_logps is None and grad_entropies is None:
        return (None,) * 5
    *statistics, logits, target_ids, temperatures = ctx.saved_tensors
    if grad_logps is None:
        grad_logps = torch.zeros_like(statistics[0])
    slopes = (grad_logps, grad_entropies, *statistics)
    if ctx.is_inplace:
        gradients = logits.detach()
        selected_logps_inplace_backward_op(
            gradients, *slopes, target_ids, temperatures, ctx.implementation
        )
    else:
        gradients = torch.empty_like(logits)
        selected_logps_backward_op(
            gradients, *slopes, logits, target_ids, temperatures, ctx.implementation
        )
    return gradients, None, None, None, None


selected_logps_op.register_autograd(_backward, setup_context=_save_for_backward)
