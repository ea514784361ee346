"""Rewards, advantages and which completions stay, in the order that a method asks for them.

Legend: B completions, S trained tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastrl.advantages import PER_TOKEN, value_targets
from fastrl.methods.axes import hyper_parameters_of
from fastrl.methods.inputs import StepInputs, apply
from fastrl.methods.needs import (
    counts_every_completion,
    estimates_from_tokens,
    selects_before_tokens,
)
from fastrl.methods.record import Method, training_parameter
from fastrl.ragged import counts, number_of
from fastrl.reward_shaping import TOKEN_REWARD_SHAPINGS
from fastrl.selection import first_of_completion, with_gradient


def rows_to_train(method: Method, inputs: StepInputs) -> tuple[StepInputs, Tensor, Tensor]:
    """The step with what is known of it before tokens; advantages (B,); the rows to encode (B,).

    Where advantages come before tokens, rows whose gradient is zero by construction are left out;
    where tokens come first, every row is needed that the selection keeps, or every counted row if
    the selection looks at tokens too.
    """
    advantages = torch.zeros_like(inputs.rewards)
    if estimates_from_tokens(method):
        if selects_before_tokens(method):
            left = selected(method, shaped(method, inputs))
            inputs = dataclasses.replace(inputs, lengths=left.lengths, copies=left.copies)
        return inputs, advantages, inputs.lengths > 0
    inputs = shaped(method, inputs)
    if not method.has_advantage:
        inputs = selected(method, inputs)
    else:
        inputs = _with_advantages(method, inputs)
        assert inputs.advantages is not None
        advantages = torch.where(inputs.lengths > 0, inputs.advantages, 0)
        inputs = dataclasses.replace(inputs, advantages=advantages)
    kept = with_gradient(advantages, inputs.lengths, has_penalty=counts_every_completion(method))
    return inputs, advantages, kept


def estimated(method: Method, inputs: StepInputs) -> StepInputs:
    """The step with shaped rewards, advantages of every token, and what is left out at length 0."""
    inputs = with_value_targets(method, shaped(method, inputs))
    if selects_before_tokens(method):  # rows_to_train has left out the others
        if not method.has_advantage:
            return inputs
        return dataclasses.replace(inputs, advantages=token_advantages(method, inputs))
    if method.has_advantage:
        advantages = token_advantages(method, inputs)
        first = first_of_completion(advantages, inputs.lengths)
        inputs = dataclasses.replace(inputs, advantages=advantages, completion_advantages=first)
    return selected(method, inputs)


def shaped(method: Method, inputs: StepInputs) -> StepInputs:
    """The step with the method's rewards, of completions and, once there are tokens, of these."""
    choice, of_tokens = method.reward_shaping, method.token_reward_shaping
    if choice is not None and choice.name not in TOKEN_REWARD_SHAPINGS:
        inputs = dataclasses.replace(inputs, rewards=apply("reward_shaping", choice, inputs))
    inputs = _with_token_rewards(inputs)
    if choice is not None and choice.name in TOKEN_REWARD_SHAPINGS:
        rewards = apply("reward_shaping", choice, inputs)
        inputs = dataclasses.replace(inputs, token_rewards=rewards)
    if of_tokens is not None and inputs.token_rewards is not None:
        rewards = apply("token_reward_shaping", of_tokens, inputs)
        inputs = dataclasses.replace(inputs, token_rewards=rewards)
    return inputs


def with_value_targets(method: Method, inputs: StepInputs) -> StepInputs:
    """The step with what the value model should say of each token, discounted as advantages are."""
    if method.value_loss is None:
        return inputs
    assert inputs.token_rewards is not None
    assert inputs.values is not None
    advantage = method.advantage
    known = {**hyper_parameters_of("advantage", advantage.name), **advantage.parameters}
    targets = value_targets(
        inputs.token_rewards,
        inputs.values,
        inputs.tokens,
        discount=known.get("discount", 1.0),
        value_lambda=training_parameter(method.value_loss, "value_lambda"),
    )
    return dataclasses.replace(inputs, value_targets=targets)


def selected(method: Method, inputs: StepInputs) -> StepInputs:
    """The step without the completions that the method leaves out; they leave all averages."""
    if method.selection is None:
        return inputs
    kept = apply("selection", method.selection, inputs)
    copies = None if kept.dtype == torch.bool else kept
    return dataclasses.replace(inputs, lengths=inputs.lengths * (kept > 0), copies=copies)


def kept_prompts(method: Method, inputs: StepInputs) -> Tensor:
    """(P,) bool: prompts to train on; all but those that dynamic sampling replaces."""
    num_prompts = number_of(inputs.groups)
    if not method.dynamic_sampling:
        return torch.ones(num_prompts, dtype=torch.bool)
    counted = selected(method, shaped(method, inputs)).lengths > 0
    return counts(inputs.groups[counted], num_prompts) > 0


def advantages_of(method: Method, inputs: StepInputs) -> Tensor:
    """(B,), or (S,) where the estimator looks at tokens."""
    values: Tensor = apply("advantage", method.advantage, inputs)
    return values


def token_advantages(method: Method, inputs: StepInputs) -> Tensor:
    """(S,) advantages, whatever the estimator looks at."""
    values = advantages_of(method, inputs)
    return values if method.advantage.name in PER_TOKEN else values[inputs.tokens]


def _with_advantages(method: Method, inputs: StepInputs) -> StepInputs:
    """The step with advantages (B,) and the selection, in the order of the method."""
    if not method.advantage_after_selection:
        values = advantages_of(method, inputs)
        inputs = dataclasses.replace(inputs, completion_advantages=values)
        return dataclasses.replace(selected(method, inputs), advantages=values)
    inputs = selected(method, inputs)
    kept = inputs.lengths > 0
    values = torch.zeros_like(inputs.rewards)
    if kept.any():
        values[kept] = advantages_of(method, counted_only(inputs, kept)).to(values)
    return dataclasses.replace(inputs, advantages=values)


def counted_only(inputs: StepInputs, kept: Tensor) -> StepInputs:
    """The step as if the other completions had not been sampled, before there are tokens."""
    parts = inputs.reward_parts
    return dataclasses.replace(
        inputs,
        rewards=inputs.rewards[kept],
        groups=inputs.groups[kept],
        lengths=inputs.lengths[kept],
        finished=inputs.finished[kept],
        reward_parts=None if parts is None else parts[:, kept],
    )


def _with_token_rewards(inputs: StepInputs) -> StepInputs:
    """The reward of a completion on its last token, where tokens are known."""
    if inputs.completion_index is None:
        return inputs
    token_rewards = inputs.rewards[inputs.tokens]
    token_rewards[:-1][inputs.tokens[1:] == inputs.tokens[:-1]] = 0
    return dataclasses.replace(inputs, token_rewards=token_rewards)
