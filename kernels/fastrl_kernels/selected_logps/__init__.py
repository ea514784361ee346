"""Log-probabilities and entropies of targets for callers who hold the logits."""

from torch import Tensor

from fastrl_kernels.head import per_token_temperature
from fastrl_kernels.implementation import check_finite, choose_implementation
from fastrl_kernels.linear_logps.reference import LinearLogps
from fastrl_kernels.selected_logps.op import selected_logps_op
from fastrl_kernels.selected_logps.reference import selected_logps_reference

__all__ = ["selected_logps", "selected_logps_reference"]


def selected_logps(
    logits: Tensor,
    target_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
    check: bool = False,
    implementation: str = "auto",
) -> LinearLogps:
    """Log-probabilities of targets and statistics of softmax(logits / temperature), (S,) each.

    logits: (S, V) bf16, fp16, fp32 or fp64, read once forward and once backward; rows may be apart
    in memory. target_ids: (S,) int64; a negative one marks an ignored row, which is zero in every
    output and has no gradient. temperature: one positive number or (S,) of them. Sums are float32
    whatever the logits are; but logits rounded to half precision stay rounded.
    inplace_backward: the gradient takes the place of the logits, which are lost then.
    check: raise where the logits are not finite, which waits for the device.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point of shape (S, V), got {logits.dtype} of shape "
            f"{tuple(logits.shape)}; flatten a batch with .flatten(0, 1)"
        )
    num_tokens = logits.shape[0]
    if target_ids.shape != (num_tokens,) or target_ids.is_floating_point():
        raise ValueError(
            f"target_ids must be int64 of shape ({num_tokens},), got {target_ids.dtype} of shape "
            f"{tuple(target_ids.shape)}; give one id per row, negative to ignore it"
        )
    if logits.shape[1] == 0 or target_ids.device != logits.device:
        raise ValueError(
            f"expected at least one column of logits and target_ids beside them, got "
            f"{tuple(logits.shape)} on {logits.device} and target_ids on {target_ids.device}; "
            "move target_ids"
        )
    implementation = choose_implementation(implementation, logits)
    temperatures = per_token_temperature(temperature, logits)
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    outputs = selected_logps_op(
        rows, target_ids.long(), temperatures, inplace_backward, implementation
    )
    if check:
        check_finite(outputs[0], logits=logits)
    return LinearLogps._make(outputs[:-1])
