"""A step as one table of tokens, for what a method computes across its passes.

Legend: P prompts, G num_generations, B = P*G completions, N packed tokens, S trained tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.methods.coefficients import Coefficients, coefficients, token_objective
from fastrl.methods.estimates import estimated
from fastrl.methods.inputs import StepInputs
from fastrl.methods.needs import estimates_from_tokens, looks_past_tokens
from fastrl.methods.record import Method
from fastrl.packing import PackedPass
from fastrl.types import Rewards, Rollouts
from fastrl_kernels import LinearLogps, PolicyLoss
from fastrl_kernels.objectives import Parameter, Regulariser


class Prepared(NamedTuple):
    """The passes of one optimizer step with all that the loss needs, and what stands beside it."""

    passes: list[PackedPass]
    coefficients: list[Coefficients]  # of each pass
    loss: Tensor | None  # of the whole step, where that of the passes says nothing of it


def start_inputs(
    rollouts: Rollouts, rewards: Rewards, lengths: Tensor, *, max_completion_length: int,
    progress: float, generator: torch.Generator | None = None,
) -> StepInputs:  # fmt: skip
    """What is known before any token is looked at; lengths (B,) as the averages count them."""
    parts = [part.double().nan_to_num(0.0) for part in rewards.parts.values()]
    num_completions = len(rollouts.completion_ids)
    return StepInputs(
        rewards=rewards.total.double(),
        groups=torch.arange(num_completions) // rollouts.num_generations,
        lengths=lengths,
        finished=rollouts.finished,
        max_completion_length=max_completion_length,
        progress=torch.tensor(progress, dtype=torch.float64),
        generator=generator,
        reward_parts=torch.stack(parts) if parts else None,
    )


def with_sampler_logps(rollouts: Rollouts, passes: Sequence[PackedPass]) -> list[PackedPass]:
    """The passes with the sampler's log-probabilities for those of the old policy."""
    if rollouts.rollout_logps is None:
        raise InputError(
            "the method takes its ratios to the sampler's policy, but the sampler gave no "
            "log-probabilities; choose another rollout.engine"
        )
    found = []
    for item in passes:
        batch = item.batch
        rows = batch.completion_index.unique_consecutive().tolist()
        logps = torch.cat([rollouts.rollout_logps[row] for row in rows]).to(batch.advantages)
        found.append(PackedPass(item.plan, dataclasses.replace(batch, old_logps=logps)))
    return found


def token_coefficients(method: Method, passes: Sequence[PackedPass]) -> list[Coefficients]:
    """Of a method that looks at single tokens: the batches have it all but the objective."""
    objective = token_objective(method)
    return [
        Coefficients(
            objective, item.batch.advantages, item.batch.token_weights, None, method.entropy_coef
        )
        for item in passes
    ]


def with_tokens(
    inputs: StepInputs, rollouts: Rollouts, passes: Sequence[PackedPass],
    statistics: Sequence[LinearLogps],
) -> StepInputs:  # fmt: skip
    """The step with one value for each trained token, in float64 on the CPU.

    statistics: of the current policy, one for each pass. Without old_logps in the passes the
    current policy is the old one.
    """

    def gather(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present).double().cpu() if present else None

    batches = [item.batch for item in passes]
    index = torch.cat([batch.completion_index for batch in batches]).cpu()
    sampled = rollouts.rollout_logps
    rows = index.unique_consecutive().tolist()
    logps = gather([item.logps for item in statistics])
    old_logps = gather([batch.old_logps for batch in batches])
    return dataclasses.replace(
        inputs,
        completion_index=index,
        logps=logps,
        old_logps=logps if old_logps is None else old_logps,
        ref_logps=gather([batch.ref_logps for batch in batches]),
        rollout_logps=None if sampled is None else gather([sampled[row] for row in rows]),
        entropies=gather([item.entropies for item in statistics]),
        sum_p2=gather([item.sum_p2 for item in statistics]),
        sum_p3=gather([item.sum_p3 for item in statistics]),
    )


def prepare(
    method: Method, rollouts: Rollouts, inputs: StepInputs, passes: Sequence[PackedPass],
    measure: Callable[[PackedPass], LinearLogps], *, is_first: bool,
) -> tuple[StepInputs, Prepared]:  # fmt: skip
    """What the loss needs of each token; `measure` runs the current policy where that takes it.

    is_first: before the first optimizer step on these completions, when advantages are made.
    """
    if not looks_past_tokens(method):
        return inputs, Prepared(list(passes), token_coefficients(method, passes), None)
    advantages = inputs.advantages
    inputs = with_tokens(inputs, rollouts, passes, [measure(item) for item in passes])
    if is_first and estimates_from_tokens(method):
        inputs = estimated(method, inputs)
    elif is_first and advantages is not None:
        inputs = dataclasses.replace(inputs, advantages=advantages[inputs.tokens])
    return inputs, prepared(method, inputs, passes)


def prepared(method: Method, inputs: StepInputs, passes: Sequence[PackedPass]) -> Prepared:
    """Advantages, weights and the objective of every token, given to the passes that hold them."""
    found = coefficients(method, inputs)
    filled, each, start = [], [], 0
    for item in passes:
        batch = item.batch
        rows = torch.arange(start, start + len(batch.target_ids))
        start += len(rows)
        part = _rows_of(found, rows, like=batch.advantages)
        batch = dataclasses.replace(
            batch,
            advantages=part.advantages,
            token_weights=part.token_weights,
            rollout_weights=part.rollout_weights,
        )
        filled.append(PackedPass(item.plan, batch))
        each.append(part)
    return Prepared(filled, each, found.loss)


def _rows_of(found: Coefficients, rows: Tensor, *, like: Tensor) -> Coefficients:
    """Those of some tokens, on the device and in the dtype of `like`."""
    num_tokens = len(found.advantages)

    def rows_of(value: Tensor) -> Tensor:
        value = value[rows] if value.shape == (num_tokens,) else value
        return value.to(like.device, value.dtype if value.dtype == torch.bool else like.dtype)

    def of(value: Parameter) -> Parameter:
        return rows_of(value) if isinstance(value, Tensor) else value

    objective = found.objective._replace(
        hyper_parameters=tuple(map(of, found.objective.hyper_parameters)),
        regularisers=tuple(
            Regulariser(x.function, of(x.coefficient), tuple(map(of, x.hyper_parameters)))
            for x in found.objective.regularisers
        ),
    )
    return Coefficients(
        objective=objective,
        advantages=rows_of(found.advantages),
        token_weights=rows_of(found.token_weights),
        rollout_weights=None if found.rollout_weights is None else rows_of(found.rollout_weights),
        entropy_coef=of(found.entropy_coef),
        clipped=None if found.clipped is None else rows_of(found.clipped),
    )


def step_loss(ready: Prepared, losses: Sequence[PolicyLoss]) -> float:
    """The loss of the step; where slopes stand for surrogates, with the value of these instead."""
    total = sum(float(item.loss) for item in losses)
    if ready.loss is None:
        return total
    for item, out in zip(ready.passes, losses, strict=True):
        batch = item.batch
        slopes = batch.token_weights * batch.advantages
        if batch.rollout_weights is not None:
            slopes = slopes * batch.rollout_weights
        total += float(torch.dot(slopes, out.logps))
    return total + float(ready.loss)


def with_old_logps(passes: Sequence[PackedPass], losses: Sequence[PolicyLoss]) -> list[PackedPass]:
    """The first iteration's log-probabilities are the old policy's: no extra forward."""
    return [
        item
        if item.batch.old_logps is not None
        else PackedPass(item.plan, dataclasses.replace(item.batch, old_logps=loss.logps))
        for item, loss in zip(passes, losses, strict=True)
    ]
