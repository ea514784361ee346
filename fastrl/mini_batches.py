"""A step cut by prompts into the parts of which each is one optimizer step.

Rewards, advantages and selections are of the whole step; weights of tokens are normalised over the
part, so that an optimizer step has the same size however many parts there are, and a part that
holds few tokens is no smaller step. A completion of another part counts as left out: its length
is 0.

Legend: P prompts, B completions, S trained tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.methods.inputs import PER_TOKEN, StepInputs
from fastrl.packing import PackedPass
from fastrl.ragged import number_of


class MiniBatch(NamedTuple):
    """The prompts of one optimizer step."""

    rows: Tensor  # (B,) bool: its completions
    inputs: StepInputs  # with lengths of 0 for the completions of other parts
    passes: list[PackedPass]

    @property
    def num_tokens(self) -> int:
        """Trained tokens."""
        return sum(len(item.batch.target_ids) for item in self.passes)


def cut(groups: Tensor, num_mini_batches: int) -> list[Tensor]:
    """For each part (B,) bool, its completions: prompts in order, sizes that differ by one at most.

    groups: (B,) prompt of each completion. There are no more parts than prompts.
    """
    num_prompts = number_of(groups)
    num_parts = min(num_mini_batches, num_prompts)
    part_of_prompt = torch.arange(num_prompts) * num_parts // max(num_prompts, 1)
    return [part_of_prompt[groups] == part for part in range(num_parts)]


def only(inputs: StepInputs, rows: Tensor) -> StepInputs:
    """The step as one part sees it: completions but for `rows` (B,) bool are left out."""
    return dataclasses.replace(inputs, lengths=torch.where(rows, inputs.lengths, 0))


def with_tokens_of(parts: Sequence[MiniBatch], inputs: StepInputs) -> list[MiniBatch]:
    """The parts with what the whole step has found out; `inputs` has the tokens of all parts in
    their order.
    """
    names = sorted(PER_TOKEN | {"advantages"})
    found, start = [], 0
    for part in parts:
        end = start + part.num_tokens
        changes = {
            name: values[start:end]
            for name in names
            if (values := getattr(inputs, name)) is not None
        }
        own = dataclasses.replace(only(inputs, part.rows), **changes)
        found.append(part._replace(inputs=own))
        start = end
    return found


def drawn_order(num_parts: int, generator: torch.Generator) -> list[int]:
    """The order in which an iteration takes the parts."""
    if num_parts == 1:
        return [0]
    order: list[int] = torch.randperm(num_parts, generator=generator).tolist()
    return order
