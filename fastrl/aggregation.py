"""How the losses of tokens are averaged over one optimizer step.

Legend: P prompts, G num_generations, B = P*G. Every rule maps the completion lengths (B,), zero
where a completion was masked out, to the weight (B,) that each token of a completion carries in
loss = sum over tokens of weight * token loss. The denominators span the whole optimizer step and
are at least 1, so that neither passes nor packing can change the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AggregationRule = Callable[[Tensor, int, int], Tensor]


def token_mean(lengths: Tensor, num_generations: int, max_completion_length: int) -> Tensor:
    """1 / all tokens: every token counts alike (DAPO, arXiv:2503.14476)."""
    return torch.ones(lengths.shape, dtype=torch.float64) / lengths.sum().clamp(min=1)


def sequence_mean(lengths: Tensor, num_generations: int, max_completion_length: int) -> Tensor:
    """1 / (B * length): every completion counts alike (GRPO, arXiv:2402.03300)."""
    return 1.0 / (lengths.clamp(min=1).double() * _num_counted(lengths))


def sequence_sum(lengths: Tensor, num_generations: int, max_completion_length: int) -> Tensor:
    """1 / B: the log-probability of a completion is the sum over its tokens (RLOO, REINFORCE)."""
    return torch.ones(lengths.shape, dtype=torch.float64) / _num_counted(lengths)


def constant(lengths: Tensor, num_generations: int, max_completion_length: int) -> Tensor:
    """1 / (B * max_completion_length): no bias towards any length (Dr. GRPO, arXiv:2503.20783)."""
    return sequence_sum(lengths, num_generations, 0) / max_completion_length


def prompt_mean(lengths: Tensor, num_generations: int, max_completion_length: int) -> Tensor:
    """1 / (P * tokens of the group): every prompt counts alike (ScaleRL, arXiv:2510.13786)."""
    group_tokens = lengths.view(-1, num_generations).sum(dim=1)
    num_prompts = (group_tokens > 0).sum().clamp(min=1)
    weights = 1.0 / (group_tokens.clamp(min=1).double() * num_prompts)
    return weights.repeat_interleave(num_generations)


AGGREGATIONS: dict[str, AggregationRule] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant": constant,
    "prompt_mean": prompt_mean,
}


def _num_counted(lengths: Tensor) -> Tensor:
    """Completions with at least one token; masked-out ones leave the average."""
    return (lengths > 0).sum().clamp(min=1)
