"""Log-probabilities and entropies straight from hidden states and a language-model head."""

from torch import Tensor

from fastrl_kernels.head import LMHead, as_lm_head, check_inputs, per_token_temperature
from fastrl_kernels.implementation import choose_implementation
from fastrl_kernels.linear_logps.op import linear_logps_op
from fastrl_kernels.linear_logps.plan import plan_for
from fastrl_kernels.linear_logps.reference import LinearLogps, linear_logps_reference

__all__ = ["LinearLogps", "linear_logps", "linear_logps_reference"]


def linear_logps(
    hidden_states: Tensor,
    lm_head: LMHead | Tensor,
    target_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    workspace_mb: float = 256,
    batch_invariant: bool = False,
    implementation: str = "auto",
) -> LinearLogps:
    """Log-probabilities of targets and statistics of softmax(logits / temperature), (S,) each.

    hidden_states: (S, D). lm_head: an LMHead or a (V, D) weight of the same dtype. target_ids: (S,)
    int64; a negative one marks an ignored row, which is zero in every output and has no gradient.
    temperature: one positive number or (S,) of them. logps and entropies give gradients to
    hidden_states and to every tensor of the head that requires one; a frozen head costs nothing.

    No (S, V) tensor exists, forward or backward. workspace_mb: MiB for everything but outputs and
    gradients; those of the head are summed in float32 and rounded once. batch_invariant: a row has
    the same bits alone and in any batch, for one workspace_mb; a small call then costs as much as a
    full chunk of rows.
    """
    choose_implementation(implementation)
    head = as_lm_head(lm_head)
    check_inputs(hidden_states, head, target_ids)
    temperatures = per_token_temperature(temperature, hidden_states)
    plan_for(hidden_states, head, workspace_mb)  # raises here if the workspace is too small
    outputs = linear_logps_op(
        hidden_states,
        head.weight,
        head.bias,
        head.lora_a,
        head.lora_b,
        target_ids,
        temperatures,
        head.lora_scale,
        head.logit_scale,
        head.softcap,
        head.vocab_size,
        float(workspace_mb),
        batch_invariant,
    )
    return LinearLogps(*outputs)
