"""A step as one table of tokens, for what a method computes across its passes.

Legend: P prompts, G num_generations, B = P*G completions, N packed tokens, S trained tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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


class TokenStatistics(NamedTuple):
    """What a policy thinks of the tokens of a pass, (S,) each."""

    head: LinearLogps
    squared_hidden_norms: Tensor  # of hidden states as the logits are linear in them

    values: Tensor | None = None  # of a value model, where there is one

    @property
    def logps(self) -> Tensor:
        """Log-probabilities."""
        return self.head.logps


class ValueTerms(NamedTuple):
    """What the value loss of a pass needs of each of its tokens, (S,) each."""

    old_values: Tensor
    targets: Tensor
    weights: Tensor  # share in the average over the optimizer step; 0 where nothing is learned


class Prepared(NamedTuple):
    """The passes of one optimizer step with all that the loss needs, and what stands beside it."""

    passes: list[PackedPass]
    coefficients: list[Coefficients]  # of each pass
    loss: Tensor | None = None  # of the whole step, where that of the passes says nothing of it
    kept: Tensor | None = None  # bool: which of all measured tokens the passes have; None for all
    values: tuple[ValueTerms, ...] = ()  # of each pass, where there is a value model


def start_inputs(
    rollouts: Rollouts, rewards: Rewards, lengths: Tensor, *, max_completion_length: int,
    progress: float, generator: torch.Generator | None = None, reward_scale: Tensor | None = None,
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
        reward_scale=reward_scale,
        reward_parts=torch.stack(parts) if parts else None,
    )


def with_sampler_logps(passes: Sequence[PackedPass]) -> list[PackedPass]:
    """The passes with the sampler's log-probabilities for those of the old policy."""
    found = []
    for item in passes:
        logps = item.batch.rollout_logps
        if logps is None:
            raise InputError(
                "the method takes its ratios to the sampler's policy, but the sampler gave no "
                "log-probabilities; choose another rollout.engine"
            )
        batch = dataclasses.replace(item.batch, old_logps=logps.to(item.batch.advantages))
        found.append(PackedPass(item.plan, batch))
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
    inputs: StepInputs, passes: Sequence[PackedPass], statistics: Sequence[TokenStatistics]
) -> StepInputs:
    """The step with one value for each trained token, in float64 on the CPU.

    statistics: of the current policy, one for each pass. Without old_logps in the passes the
    current policy is the old one.
    """

    def gather(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present).double().cpu() if present else None

    known = inputs.values is not None  # from before the first update
    batches = [item.batch for item in passes]
    logps = gather([item.logps for item in statistics])
    old_logps = gather([batch.old_logps for batch in batches])
    return dataclasses.replace(
        inputs,
        completion_index=torch.cat([batch.completion_index for batch in batches]).cpu(),
        logps=logps,
        old_logps=logps if old_logps is None else old_logps,
        ref_logps=gather([batch.ref_logps for batch in batches]),
        rollout_logps=gather([batch.rollout_logps for batch in batches]),
        entropies=gather([item.head.entropies for item in statistics]),
        sum_p2=gather([item.head.sum_p2 for item in statistics]),
        sum_p3=gather([item.head.sum_p3 for item in statistics]),
        squared_hidden_norms=gather([item.squared_hidden_norms for item in statistics]),
        values=inputs.values if known else gather([item.values for item in statistics]),
    )


def estimates(
    method: Method, inputs: StepInputs, passes: Sequence[PackedPass],
    statistics: Sequence[TokenStatistics],
) -> StepInputs:  # fmt: skip
    """The step with rewards, advantages and selection that are computed from its tokens.

    statistics: of the policy before the first update of the step, one for each pass.
    """
    return estimated(method, with_tokens(inputs, passes, statistics))


def prepare(
    method: Method, inputs: StepInputs, passes: Sequence[PackedPass],
    statistics: Sequence[TokenStatistics], *, trim: bool,
) -> Prepared:  # fmt: skip
    """What the loss of one update needs of each token, and the passes with the tokens that have a
    weight.

    inputs: after `estimates`, where the method has some. statistics: of the current policy, one for
    each pass, or none where the loss does not look at them. trim: what only dropped tokens depend
    on is not encoded, as the layers have yet to run.
    """
    if not looks_past_tokens(method):
        return Prepared(list(passes), token_coefficients(method, passes))
    advantages = inputs.advantages
    inputs = with_tokens(inputs, passes, statistics)
    if advantages is not None and not estimates_from_tokens(method):
        inputs = dataclasses.replace(inputs, advantages=advantages[inputs.tokens])
    return prepared(method, inputs, passes, trim=trim)


def prepared(
    method: Method, inputs: StepInputs, passes: Sequence[PackedPass], *, trim: bool
) -> Prepared:
    """Advantages, weights and the objective of every token that has a weight, in its pass.

    A weight of 0 takes value, penalties and entropy bonus of a token alike, so its row is dropped;
    a pass with no other tokens is left out.
    """
    found = coefficients(method, inputs)
    values = value_terms(method, inputs)
    is_kept = found.token_weights != 0
    if values is not None:
        is_kept = is_kept | (values.weights != 0)
    filled, each, of_values, start = [], [], [], 0
    for item in passes:
        rows = torch.arange(start, start + len(item.batch.target_ids))
        start += len(rows)
        kept = is_kept[rows]
        if not kept.any():
            continue
        if not kept.all():
            item = item.keep_tokens(kept.to(item.plan.target_ids.device), trim=trim)
            rows = rows[kept]
        part = _rows_of(found, rows, like=item.batch.advantages)
        batch = dataclasses.replace(
            item.batch,
            advantages=part.advantages,
            token_weights=part.token_weights,
            rollout_weights=part.rollout_weights,
        )
        filled.append(PackedPass(item.plan, batch))
        each.append(part)
        if values is not None:
            of_values.append(ValueTerms(*(x[rows].to(item.batch.advantages) for x in values)))
    return Prepared(filled, each, found.loss, is_kept, tuple(of_values))


def value_terms(method: Method, inputs: StepInputs) -> ValueTerms | None:
    """What the value loss needs of all tokens; None of a method without a value model.

    Every token counts alike, whatever its weight in the loss of the policy.
    """
    if method.value_loss is None:
        return None
    assert inputs.values is not None
    assert inputs.value_targets is not None
    counts = (inputs.lengths > 0)[inputs.tokens]
    if method.value_tokens == "finished":
        counts = counts & inputs.finished[inputs.tokens]
    weights = counts / counts.sum().clamp(min=1)
    return ValueTerms(inputs.values, inputs.value_targets, weights.to(inputs.values))


def trained_advantages(inputs: StepInputs, ready: Prepared) -> Tensor | None:
    """(S,) the advantage of each token of the passes; None where the loss compares completions."""
    if inputs.advantages is None or not ready.passes:
        return None
    index = torch.cat([x.batch.completion_index for x in ready.passes]).cpu()
    if inputs.completion_index is None:
        return inputs.advantages[index]
    return inputs.advantages if ready.kept is None else inputs.advantages[ready.kept]


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


def with_old_logps(passes: Sequence[PackedPass], logps: Sequence[Tensor]) -> list[PackedPass]:
    """The passes with the log-probabilities of the first iteration, which are the old policy's."""
    return [
        item
        if item.batch.old_logps is not None
        else PackedPass(item.plan, dataclasses.replace(item.batch, old_logps=old))
        for item, old in zip(passes, logps, strict=True)
    ]
