"""Which completions of a batch cannot teach anything, and which should share a micro-batch.

Legend: B completions, P padded length of prompts, C of completions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl.integrations.trl_one_pass import entropy_coef_of, loss_mask

INDEPENDENT = ("grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
"""Loss types whose gradient of a step does not depend on which completions share a micro-batch."""


def without_gradient(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """(B,) bool: completions of which no token can have a gradient in TRL's GRPO or RLOO loss.

    Advantages multiply every surrogate; a penalty or bonus of its own teaches the others, too.
    """
    mask = loss_mask(inputs)
    # RLOO has its penalty in the rewards.
    if hasattr(trainer, "loss_type") and (trainer.beta != 0.0 or entropy_coef_of(trainer) != 0.0):
        return ~mask.any(1)
    advantages = inputs["advantages"]  # (B,), or (B, C) of a subclass
    learning = advantages if advantages.dim() == 2 else advantages[:, None]
    return ~((learning != 0) & (mask != 0)).any(1)


def apart(silent: Tensor, inputs: dict[str, Any]) -> Tensor | None:
    """(B,) bool: those without gradient that are cheaper in a forward pass of their own.

    None where there are none. silent: (B,) as `without_gradient` says. A completion that stays with
    its group pays for a backward pass of its own tokens; apart it pays for its prompt once more,
    unless all of its group is apart. At least one stays, so that every parameter has a gradient,
    if only of zeros.
    """
    lengths = inputs["completion_mask"].sum(1)
    groups = groups_of(inputs)
    num_groups = groups.shape[0]  # an upper bound, which needs no waiting for the device
    learning = torch.zeros(num_groups, dtype=lengths.dtype, device=lengths.device)
    learning.index_add_(0, groups, (~silent).to(lengths.dtype))
    backward = torch.zeros_like(learning).index_add_(0, groups, 2 * lengths * silent)
    prompt = inputs["prompt_mask"].sum(1)
    is_apart = silent & ((learning[groups] == 0) | (backward[groups] > prompt))
    if bool(is_apart.all()):
        is_apart[lengths.argmin()] = False
    return is_apart if bool(is_apart.any()) else None


def groups_of(inputs: dict[str, Any]) -> Tensor:
    """(B,) int64: equal for completions of equal prompts."""
    prompts = torch.where(inputs["prompt_mask"] != 0, inputs["prompt_ids"], -1)
    return torch.unique(prompts, dim=0, return_inverse=True)[1]


def can_regroup(trainer: Any) -> bool:
    """Whether completions may change places among the micro-batches of an optimizer step.

    TRL shuffles them there. A mean over the tokens of one micro-batch, its quantile of entropies or
    its routers' loss would not stay the same. RLOO's loss is a mean over completions.
    """
    if not hasattr(trainer, "loss_type"):
        return not trainer.aux_loss_enabled
    return (
        trainer.loss_type in INDEPENDENT
        and trainer.top_entropy_quantile == 1.0
        and not trainer._entropy_bonus_enabled
        and not trainer.aux_loss_enabled
    )


def regrouped(batches: list[dict[str, Any]], num_accumulated: int) -> list[dict[str, Any]]:
    """Micro-batches in which completions of a prompt are together, as far as they were in one step.

    batches: TRL's, all that was generated at once. num_accumulated: micro-batches of an optimizer
    step; where one neither divides the other, steps straddle the batches, and nothing changes.
    Sizes stay as they are; so does everything where there are images.
    """
    window = min(num_accumulated, len(batches))
    if window < 2 or len(batches) % window or num_accumulated % window:
        return batches
    if any(isinstance(value, list) for value in batches[0].values()):
        return batches
    return [
        batch
        for start in range(0, len(batches), window)
        for batch in _sorted_by_group(batches[start : start + window])
    ]


def _sorted_by_group(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    size = len(batches[0]["prompt_ids"])
    whole = {
        name: torch.cat([batch[name] for batch in batches]) if _has_rows(value) else value
        for name, value in batches[0].items()
    }
    order = groups_of(whole).argsort(stable=True)
    return [
        {
            name: value[order[start : start + size]] if _has_rows(value) else value
            for name, value in whole.items()
        }
        for start in range(0, len(order), size)
    ]


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
