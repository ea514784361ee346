"""What an update takes, what each of its optimizer steps did, and what it all came to.

Legend: S trained tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.critic import ValueRecord
from fastrl.loss import Measured
from fastrl.methods.inputs import StepInputs
from fastrl.methods.record import Method
from fastrl.mini_batches import MiniBatch
from fastrl.packing import PackedPass
from fastrl.phases import Prepared
from fastrl.rollout_check import sampler_gap
from fastrl.savings import Work
from fastrl.types import StepMetrics
from fastrl_kernels import PolicyLoss


class Packed(NamedTuple):
    """A step as passes, and what its method has yet to find out from their tokens."""

    method: Method
    inputs: StepInputs
    parts: list[MiniBatch]


class Done(NamedTuple):
    """One optimizer step, or what would have been one: num_skipped is 1 if it was not finite."""

    ready: Prepared
    losses: list[PolicyLoss]
    values: list[ValueRecord]
    advantages: Tensor | None
    measured: Work
    loss: float = 0.0
    grad_norm: float = 0.0
    num_skipped: int = 0


class Update(NamedTuple):
    """What the optimizer did with a step: its last iteration, pass by pass."""

    learning_rate: float
    inputs: StepInputs
    grad_norm: float = 0.0
    passes: tuple[PackedPass, ...] = ()
    losses: tuple[PolicyLoss, ...] = ()
    loss: float = 0.0
    clipped: tuple[Tensor | None, ...] = ()
    advantages: Tensor | None = None
    values: tuple[ValueRecord, ...] = ()
    measured: Work = Work()
    sampler_gap: StepMetrics | None = None
    num_steps: int = 0
    num_skipped: int = 0


def packed_anew(parts: Sequence[MiniBatch], others: Sequence[MiniBatch]) -> list[MiniBatch]:
    """The parts in the passes of others, which have the same tokens in the same order.

    What the step has found out of its tokens since they were packed stays what it was.
    """
    known = {rows_of(part): part for part in others}
    return [_in_passes_of(part, known[rows_of(part)]) for part in parts]


def rows_of(part: MiniBatch) -> tuple[int, ...]:
    """Its completions, which no other part has."""
    return tuple(part.rows.nonzero()[:, 0].tolist())


def _in_passes_of(part: MiniBatch, other: MiniBatch) -> MiniBatch:
    targets = [torch.cat([x.batch.target_ids for x in y.passes]) for y in (part, other)]
    assert torch.equal(*targets), "the same tokens in the same order"
    if part.passes[0].batch.old_logps is None:
        return part._replace(passes=other.passes)
    known = torch.cat([x.batch.old_logps for x in part.passes if x.batch.old_logps is not None])
    sizes = [len(item.batch.target_ids) for item in other.passes]
    passes = [
        PackedPass(item.plan, dataclasses.replace(item.batch, old_logps=own))
        for item, own in zip(other.passes, known.split(sizes), strict=True)
    ]
    return part._replace(passes=passes)


def gap_of(done: Done, part: MiniBatch, view: Measured) -> StepMetrics:
    """Sampler against policy over the part that was trained first, before it was."""
    if done.losses:
        return sampler_gap(done.ready.passes, done.losses)
    return sampler_gap(part.passes, view.statistics) if view.statistics else {}


def summed(result: Update, done: Sequence[Done]) -> Update:
    """An iteration as one: what was trained, side by side, and means over its updates."""
    applied = [item for item in done if item.ready.passes and not item.num_skipped]
    if not applied:
        return result
    trained = [item for item in applied if item.losses]
    advantages = [item.advantages for item in trained if item.advantages is not None]
    return result._replace(
        grad_norm=sum(item.grad_norm for item in applied) / len(applied),
        loss=sum(item.loss for item in applied) / len(applied),
        passes=tuple(item for x in applied for item in x.ready.passes),
        losses=tuple(item for x in trained for item in x.losses),
        clipped=tuple(item.clipped for x in trained for item in x.ready.coefficients),
        advantages=torch.cat(advantages) if advantages else None,
        values=tuple(item for x in applied for item in x.values),
        measured=Work(
            sum(x.measured.tokens for x in applied), sum(x.measured.rows for x in applied)
        ),
        num_steps=len(applied),
    )
