"""How the losses of tokens are averaged over one optimizer step.

Legend: P prompts, B completions. Every rule maps what it needs of the completion lengths (B,), the
prompt of each completion `groups` (B,) and the limit max_completion_length to the weight (B,)
float64 that each token of a completion carries in loss = sum over tokens of weight * token loss.

A length counts the trained tokens: those of an environment or a tool do not count, and a completion
that was left out has length 0 and leaves every denominator. A token whose own weight is zero still
counts, unless the lengths were counted without it. The denominators span the whole optimizer step
and are at least 1, so neither passes nor packing can change the loss. A mean over each micro-batch
would let them; methods published with one take the mean over the step here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.ragged import number_of, sums

AggregationRule = Callable[..., Tensor]


def token_mean(lengths: Tensor) -> Tensor:
    """1 / all tokens: every token counts alike (DAPO, arXiv:2503.14476)."""
    return summed(lengths) / lengths.sum().clamp(min=1)


def sequence_mean(lengths: Tensor) -> Tensor:
    """1 / (B * length): every completion counts alike (GRPO, arXiv:2402.03300)."""
    return 1.0 / (lengths.clamp(min=1).double() * _num_counted(lengths))


def sequence_sum(lengths: Tensor) -> Tensor:
    """1 / B: the log-probability of a completion is the sum over its tokens (RLOO, REINFORCE)."""
    return summed(lengths) / _num_counted(lengths)


def constant(lengths: Tensor, max_completion_length: int) -> Tensor:
    """1 / (B * max_completion_length): no bias towards any length (Dr. GRPO, arXiv:2503.20783)."""
    return sequence_sum(lengths) / max_completion_length


def fixed_constant(lengths: Tensor, *, denominator: float = 1000.0) -> Tensor:
    """1 / denominator: the loss grows with the batch (NFT, arXiv:2505.18116)."""
    if not denominator > 0:
        raise ValueError(f"expected a denominator above 0, got {denominator}; NFT uses 1000")
    return summed(lengths) / denominator


def prompt_mean(lengths: Tensor, groups: Tensor) -> Tensor:
    """1 / (P * tokens of the group): every prompt counts alike (ScaleRL, arXiv:2510.13786)."""
    group_tokens = sums(lengths.double(), groups, number_of(groups))
    num_prompts = (group_tokens > 0).sum().clamp(min=1)
    return 1.0 / (group_tokens.clamp(min=1) * num_prompts)[groups]


def summed(lengths: Tensor) -> Tensor:
    """1: the tokens bring weights that need no average."""
    return torch.ones_like(lengths, dtype=torch.float64)


AGGREGATIONS: dict[str, AggregationRule] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant": constant,
    "fixed_constant": fixed_constant,
    "prompt_mean": prompt_mean,
    "sum": summed,
}


def _num_counted(lengths: Tensor) -> Tensor:
    """Completions with at least one token; masked-out ones leave the average."""
    return (lengths > 0).sum().clamp(min=1)
