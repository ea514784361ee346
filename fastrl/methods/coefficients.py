"""From a method and the tokens of a step to the numbers that one pass of the loss needs of each.

The loss of a token is -rollout_weight * surrogate + penalties - entropy bonus, times its weight.
Where a method looks past single tokens, at the sequence, the group or the batch, that is done here
on log-probabilities without gradient, and what is left for each token is one slope.
Legend: B completions, S trained tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.methods.axes import hyper_parameters_of, inputs_of
from fastrl.methods.inputs import StepInputs, apply
from fastrl.methods.record import Choice, Method, Penalty
from fastrl.preferences import LOSSES, PAIRINGS, PreferenceInputs, preference_terms
from fastrl.token_weights import LEAVES_DENOMINATOR, kept_lengths
from fastrl_kernels.objectives import (
    REGULARISERS,
    SURROGATES,
    Objective,
    Parameter,
    Regulariser,
    evaluate,
    policy_gradient,
)


class Coefficients(NamedTuple):
    """Everything of the loss but the current policy: (S,) each, in the dtype of the step."""

    objective: Objective
    advantages: Tensor  # or the slopes that were computed from the whole step
    token_weights: Tensor
    rollout_weights: Tensor | None
    entropy_coef: Parameter
    loss: Tensor | None = None  # of the whole step, where slopes say nothing of it
    clipped: Tensor | None = None  # the same


def completion_weights(method: Method, inputs: StepInputs) -> Tensor:
    """(B,) weight of every token of a completion; 0 where it is left out."""
    if inputs.copies is None:
        weights: Tensor = apply("aggregation", method.aggregation, inputs)
        return torch.where(inputs.lengths > 0, weights, 0)
    # A completion that counts k times weighs as much as k completions, each of them averaged over.
    rows = torch.arange(len(inputs.lengths)).repeat_interleave(inputs.copies)
    repeated = dataclasses.replace(
        inputs, lengths=inputs.lengths[rows], groups=inputs.groups[rows], copies=None
    )
    weights = completion_weights(method, repeated)
    return torch.zeros(len(inputs.lengths), dtype=weights.dtype).index_add(0, rows, weights)


def coefficients(method: Method, inputs: StepInputs) -> Coefficients:
    """What the loss needs of each token; `inputs` has the advantages of all of them."""
    if method.loss is not None:
        return _of_preferences(method, inputs)
    weights = token_weights(method, inputs)
    correction = None
    if method.rollout_correction is not None:
        correction = apply("rollout_correction", method.rollout_correction, inputs)
    penalties = _penalties(method, inputs)
    assert inputs.advantages is not None
    if method.surrogate.name in SURROGATES:
        objective = _surrogate(method, inputs)._replace(regularisers=penalties)
        return Coefficients(objective, inputs.advantages, weights, correction, method.entropy_coef)
    terms = apply("surrogate", method.surrogate, inputs)
    gains = terms.values if correction is None else terms.values * correction
    return Coefficients(
        Objective(policy_gradient, (), penalties), terms.slopes, weights, correction,
        method.entropy_coef, loss=-(weights * gains).sum(),
        clipped=(terms.slopes == 0) & (inputs.advantages != 0),
    )  # fmt: skip


def token_objective(method: Method) -> Objective:
    """The objective of a method that looks at single tokens only, and computes nothing."""
    penalties = tuple(_regulariser(penalty, penalty.beta) for penalty in method.penalties)
    values = _values("surrogate", method.surrogate)
    return Objective(SURROGATES[method.surrogate.name], values, penalties)


def token_weights(method: Method, inputs: StepInputs) -> Tensor:
    """(S,) weight of every token in the loss, its share in the average included."""
    if method.token_weights is None:
        return completion_weights(method, inputs)[inputs.tokens]
    factors: Tensor = apply("token_weights", method.token_weights, _with_clipped(method, inputs))
    leaves = method.token_weights.name in LEAVES_DENOMINATOR
    if method.denominator is not None:
        leaves = method.denominator == "kept"
    if leaves:
        lengths = kept_lengths(factors, inputs.tokens, inputs.lengths)
        inputs = dataclasses.replace(inputs, lengths=lengths * (inputs.lengths > 0))
    return factors * completion_weights(method, inputs)[inputs.tokens]


def _with_clipped(method: Method, inputs: StepInputs) -> StepInputs:
    """The step with the tokens that the surrogate alone would stop, if the token weights ask."""
    assert method.token_weights is not None
    if "clipped" not in inputs_of("token_weights", method.token_weights.name):
        return inputs
    assert inputs.logps is not None
    assert inputs.old_logps is not None
    assert inputs.advantages is not None
    if method.surrogate.name not in SURROGATES:
        terms = apply("surrogate", method.surrogate, inputs)
        stopped = (terms.slopes == 0) & (inputs.advantages != 0)
        return dataclasses.replace(inputs, clipped=stopped)
    objective = _surrogate(method, inputs)
    found = evaluate(objective, inputs.logps, inputs.old_logps, None, inputs.advantages)
    return dataclasses.replace(inputs, clipped=found.clipped)


def _surrogate(method: Method, inputs: StepInputs) -> Objective:
    computed = {} if method.computed is None else apply("computed", method.computed, inputs)
    values = _values("surrogate", method.surrogate, computed)
    return Objective(SURROGATES[method.surrogate.name], values)


def _penalties(
    method: Method, inputs: StepInputs, weights: Tensor | None = None
) -> tuple[Regulariser, ...]:
    """The regularisers; `weights` where those of the tokens are in the slopes already."""
    found = []
    for penalty in method.penalties:
        coefficient: Parameter = penalty.beta
        if penalty.tokens is not None:
            coefficient = penalty.beta * apply("tokens", penalty.tokens, inputs)
        if weights is not None:
            coefficient = coefficient * weights
        found.append(_regulariser(penalty, coefficient))
    return tuple(found)


def _regulariser(penalty: Penalty, coefficient: Parameter) -> Regulariser:
    values = _values("regulariser", penalty.regulariser)
    return Regulariser(REGULARISERS[penalty.regulariser.name], coefficient, values)


def _values(
    axis: str, choice: Choice, computed: Mapping[str, Parameter] | None = None
) -> tuple[Parameter, ...]:
    """Hyper-parameters of a choice in order: published, the choice's own, computed ones."""
    known = hyper_parameters_of(axis, choice.name)
    return tuple({**known, **choice.parameters, **(computed or {})}.values())


def _of_preferences(method: Method, inputs: StepInputs) -> Coefficients:
    """Slopes of a loss of pairs or groups, which has its own average and no token weights."""
    assert method.loss is not None
    assert inputs.logps is not None
    loss = LOSSES[method.loss.name]
    given = {
        field.name: getattr(inputs, field.name)
        for field in dataclasses.fields(PreferenceInputs)
        if hasattr(inputs, field.name)
    }
    terms = preference_terms(
        loss,
        PreferenceInputs(**given),
        pairing=None if method.pairing is None else PAIRINGS[method.pairing],
        hyper_parameters=method.loss.parameters,
    )
    weights = completion_weights(method, inputs)[inputs.tokens]
    entropy_coef: Parameter = method.entropy_coef
    if method.entropy_coef:
        entropy_coef = method.entropy_coef * weights
    return Coefficients(
        Objective(policy_gradient, (), _penalties(method, inputs, weights)), -terms.slopes,
        torch.ones_like(terms.slopes), None, entropy_coef, loss=terms.loss,
    )  # fmt: skip
