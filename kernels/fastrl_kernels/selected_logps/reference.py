"""Log-probabilities of targets from logits, the obvious way.

S rows, V vocabulary.
"""

import torch
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.linear_logps.reference import LinearLogps


def selected_logps_reference(
    logits: Tensor, target_ids: Tensor, *, temperature: float | Tensor = 1.0
) -> LinearLogps:
    """`selected_logps` with the same arguments; autograd gives the gradients."""
    ignored = target_ids < 0
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    wide = torch.where(ignored[:, None], 0, logits).to(accumulation_dtype(logits.dtype))
    wide = wide / temperature
    all_logps = wide.log_softmax(-1)
    probs = all_logps.exp()
    logps = all_logps.gather(-1, target_ids.clamp(min=0)[:, None])[:, 0]
    return LinearLogps(
        logps=logps.masked_fill(ignored, 0.0),
        # 0 log 0 is 0, in the gradient too.
        entropies=-(probs * all_logps.masked_fill(probs == 0, 0.0))
        .sum(-1)
        .masked_fill(ignored, 0.0),
        lse=wide.logsumexp(-1).masked_fill(ignored, 0.0).detach(),
        sum_p2=probs.pow(2).sum(-1).masked_fill(ignored, 0.0).detach(),
        sum_p3=probs.pow(3).sum(-1).masked_fill(ignored, 0.0).detach(),
        argmax_ids=wide.argmax(-1).masked_fill(ignored, 0),
    )
