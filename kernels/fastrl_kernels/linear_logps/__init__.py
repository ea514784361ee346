"""Log-probabilities and entropies straight from hidden states and a language-model head."""

import torch
from torch import Tensor

from fastrl_kernels.head import LMHead, as_lm_head, check_inputs, per_token_temperature
from fastrl_kernels.head_arguments import NUM_TENSORS, to_arguments
from fastrl_kernels.implementation import check_finite, choose_implementation
from fastrl_kernels.linear_logps.op import linear_logps_op
from fastrl_kernels.linear_logps.reference import LinearLogps, linear_logps_reference
from fastrl_kernels.plan import MIB, make_plan, shape_of

__all__ = ["LinearLogps", "linear_logps", "linear_logps_reference"]


def linear_logps(
    hidden_states: Tensor,
    lm_head: LMHead | Tensor,
    target_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    workspace_mb: float = 256,
    batch_invariant: bool = False,
    accumulate_grad: bool = False,
    check: bool = False,
    implementation: str = "auto",
) -> LinearLogps:
    """Log-probabilities of targets and statistics of softmax(logits / temperature), (S,) each.

    hidden_states: (S, D). lm_head: an LMHead or a (V, D) weight of the same dtype. target_ids: (S,)
    int64; a negative one marks an ignored row, which is zero in every output and has no gradient.
    temperature: one positive number or (S,) of them. logps and entropies give gradients to
    hidden_states and to every tensor of the head that requires one; a frozen head costs nothing.

    No (S, V) tensor exists, forward or backward. workspace_mb: MiB for everything but outputs and
    gradients; sums are float32 and rounded once. batch_invariant: a row has the same bits alone and
    in any batch, for one workspace_mb; a small call then costs as much as a full chunk of rows.
    accumulate_grad: backward adds the weight's gradient into `weight.grad` itself, past hooks and
    without a second tensor of that size; the weight must be a leaf. check: raise where an input or
    a log-probability is not finite, which waits for the device.
    """
    implementation = choose_implementation(implementation, hidden_states)
    head = as_lm_head(lm_head)
    check_inputs(hidden_states, head, target_ids)
    check_accumulation(head, accumulate_grad)
    temperatures = per_token_temperature(temperature, hidden_states)
    # Raises here if the workspace is too small.
    make_plan("forward", shape_of(hidden_states, head), int(workspace_mb * MIB), batch_invariant)
    arguments = to_arguments(head)
    outputs = linear_logps_op(
        hidden_states, *arguments[:NUM_TENSORS], target_ids, temperatures,
        *arguments[NUM_TENSORS:], float(workspace_mb), batch_invariant, accumulate_grad,
        implementation,
    )  # fmt: skip
    if check:
        check_finite(outputs[0], hidden_states=hidden_states, **head._asdict())
    return LinearLogps._make(outputs[:-1])


def check_accumulation(head: LMHead, accumulate_grad: bool) -> None:
    """Raise ValueError unless the weight can take its gradient directly, where that is asked."""
    if not accumulate_grad:
        return
    weight = head.weight
    if not isinstance(weight, Tensor) or not weight.requires_grad or not weight.is_leaf:
        raise ValueError(
            "accumulate_grad needs a head whose weight is a leaf that requires grad, got one that "
            "is not; leave it False for a frozen or a computed weight"
        )
    if torch.compiler.is_compiling():
        raise ValueError("accumulate_grad works outside of torch.compile; leave it False inside")
