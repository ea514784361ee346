"""Log-probabilities and entropies from hidden states, the obvious way: through all the logits.

S selected tokens, D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import (
    LMHead,
    accumulation_dtype,
    as_lm_head,
    check_inputs,
    per_token_temperature,
    weight_rows,
)


class LinearLogps(NamedTuple):
    """Statistics of softmax(logits / temperature), (S,) each, in nats; zero on ignored rows.

    float32 (float64 for float64 inputs). Only logps and entropies are differentiable.
    """

    logps: Tensor
    """Log-probability of the target."""
    entropies: Tensor
    """-sum p log p"""
    lse: Tensor
    """Log of the normaliser: logsumexp(logits / temperature)."""
    sum_p2: Tensor
    """Sum of squared probabilities."""
    sum_p3: Tensor
    """Sum of cubed probabilities."""
    argmax_ids: Tensor
    """Most likely token, int64."""


def linear_logps_reference(
    hidden_states: Tensor,
    lm_head: LMHead | Tensor,
    target_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
) -> LinearLogps:
    """`linear_logps` from (S, V) logits, with the same arguments; autograd gives the gradients."""
    head = as_lm_head(lm_head)
    check_inputs(hidden_states, head, target_ids)
    temperatures = per_token_temperature(temperature, hidden_states)
    ignored = target_ids < 0

    logits = _logits(hidden_states, head).masked_fill(ignored[:, None], 0.0)
    logits = logits / temperatures[:, None]  # (S, V)
    all_logps = logits.log_softmax(-1)
    probs = all_logps.exp()
    logps = all_logps.gather(-1, target_ids.clamp(min=0)[:, None])[:, 0]
    # 0 log 0 is 0, in the gradient too.
    entropies = -(probs * all_logps.masked_fill(probs == 0, 0.0)).sum(-1)
    return LinearLogps(
        logps=logps.masked_fill(ignored, 0.0),
        entropies=entropies.masked_fill(ignored, 0.0),
        lse=logits.logsumexp(-1).masked_fill(ignored, 0.0).detach(),
        sum_p2=probs.pow(2).sum(-1).masked_fill(ignored, 0.0).detach(),
        sum_p3=probs.pow(3).sum(-1).masked_fill(ignored, 0.0).detach(),
        argmax_ids=logits.argmax(-1).masked_fill(ignored, 0),
    )


def _logits(hidden_states: Tensor, head: LMHead) -> Tensor:
    """(S, vocab_size) logits before the temperature, in the accumulation dtype."""
    dtype = accumulation_dtype(hidden_states.dtype)
    hidden = hidden_states.to(dtype)
    logits = hidden @ weight_rows(head, slice(0, head.weight.shape[0])).to(dtype).T
    if head.lora_a is not None and head.lora_b is not None:
        low_rank = hidden @ head.lora_a.to(dtype).T
        logits = logits + head.lora_scale * (low_rank @ head.lora_b.to(dtype).T)
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits[:, : head.vocab_size]
