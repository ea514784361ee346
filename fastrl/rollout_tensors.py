"""Rollouts as named tensors and back, for files.

Legend: P prompts, G num_generations, B = P*G completions, T tokens of all completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastrl.types import Example, Prompts, Rollouts

RECORDED = ("rollout_logps", "rollout_entropies", "processed_logps", "sampled")


def to_tensors(rollouts: Rollouts) -> dict[str, Tensor]:
    """Everything but the examples: ragged ones as one vector beside their lengths."""
    prompts = rollouts.prompts.token_ids
    found = {
        "prompt_ids": torch.cat(prompts),
        "prompt_lengths": torch.tensor([len(ids) for ids in prompts]),
        "completion_ids": torch.cat(rollouts.completion_ids),  # (T,)
        "completion_lengths": rollouts.lengths,  # (B,)
        "finished": rollouts.finished,
    }
    for name in RECORDED:
        values = getattr(rollouts, name)
        if values is not None:
            found[name] = torch.cat(values)
    if rollouts.thinking_budgets is not None:
        found["thinking_budgets"] = rollouts.thinking_budgets
    return {name: tensor.cpu() for name, tensor in found.items()}


def prompts_of(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """P token vectors."""
    return _ragged(tensors["prompt_ids"], tensors["prompt_lengths"])


def from_tensors(tensors: Mapping[str, Tensor], examples: Sequence[Example]) -> Rollouts:
    """What `to_tensors` was given, bit by bit; the examples of its prompts are not in there."""
    lengths = tensors["completion_lengths"]
    recorded = {
        name: _ragged(tensors[name], lengths) if name in tensors else None for name in RECORDED
    }
    return Rollouts(
        prompts=Prompts(prompts_of(tensors), tuple(examples)),
        completion_ids=_ragged(tensors["completion_ids"], lengths),
        finished=tensors["finished"],
        thinking_budgets=tensors.get("thinking_budgets"),
        **recorded,
    )


def _ragged(values: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    return values.split(lengths.tolist())
