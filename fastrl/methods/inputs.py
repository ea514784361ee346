"""What the functions of a method may ask for, by name, and how each of them is given it.

Legend: B completions, S trained tokens, P prompts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.methods.axes import AXES, inputs_of, is_whole
from fastrl.methods.record import Choice, Method
from fastrl.schedules import Schedule


@dataclass(frozen=True)
class StepInputs:
    """One optimizer step as vectors, float64 where they are real; None for what it lacks."""

    rewards: Tensor  # (B,)
    groups: Tensor  # (B,) int64 prompt of each completion
    lengths: Tensor  # (B,) int64 trained tokens; 0 where a completion is left out
    finished: Tensor  # (B,) bool
    max_completion_length: int
    progress: Tensor  # () steps done over all steps
    generator: torch.Generator | None = None
    reward_parts: Tensor | None = None  # (R, B)
    completion_advantages: Tensor | None = None  # (B,), where a completion has but one
    ref_rewards: Tensor | None = None  # (R,) of completions of the policy that training began with
    ref_groups: Tensor | None = None  # (R,) int64 prompt of each of those
    baselines: Tensor | None = None  # (B,) reward that was to be expected
    copies: Tensor | None = None  # (B,) int64 times that each completion counts; None for once
    completion_index: Tensor | None = None  # (S,) int64 completion of each token
    logps: Tensor | None = None  # (S,), as all that follow
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    rollout_logps: Tensor | None = None
    entropies: Tensor | None = None
    sum_p2: Tensor | None = None
    sum_p3: Tensor | None = None
    squared_hidden_norms: Tensor | None = None  # of hidden states as the logits are linear in them
    token_rewards: Tensor | None = None
    values: Tensor | None = None  # of the value model, before the step's first update
    value_targets: Tensor | None = None  # what the value model should say
    reward_scale: Tensor | None = None  # () standard deviation of all rewards so far
    # (2,) of `fastrl.advantages.statistics.running_square` over the steps before; zeros for none
    past_squares: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    advantages: Tensor | None = None
    clipped: Tensor | None = None  # bool

    @property
    def tokens(self) -> Tensor:
        """completion_index, of a step whose tokens are known."""
        assert self.completion_index is not None
        return self.completion_index


STATISTICS = frozenset(
    {
        "completion_index",
        "logps",
        "old_logps",
        "entropies",
        "sum_p2",
        "sum_p3",
        "clipped",
        "squared_hidden_norms",
    }
)
"""Inputs that only a forward pass of the policy over all tokens of the step gives."""
PER_TOKEN = STATISTICS | {
    "ref_logps", "rollout_logps", "token_rewards", "values", "value_targets",
}  # fmt: skip
"""Inputs with one value for each token, before there are advantages."""
KNOWN = frozenset(field.name for field in dataclasses.fields(StepInputs))
WHERE_FROM = {
    "clusters": "answers that are grouped by meaning",
    "actions": "environments that number the actions of an agent",
    "tool_calls": "environments that count the calls of a tool",
    "from_reference": "completions of the reference model",
    "companions": "a third completion for every pair",
}
"""What `fastrl train` cannot give yet, and what it would take."""


def missing_inputs(axis: str, name: str) -> list[str]:
    """Inputs of a choice that no step has."""
    return sorted(set(inputs_of(axis, name)) - KNOWN)


def check_inputs(axis: str, choice: Choice, method: str) -> None:
    """Raise InputError for a choice that a training step cannot give its inputs."""
    missing = missing_inputs(axis, choice.name)
    if missing:
        sources = sorted({WHERE_FROM.get(name, "data of its own") for name in missing})
        raise InputError(
            f"method {method!r}: {axis} {choice.name} needs {', '.join(missing)}, which takes "
            f"{' and '.join(sources)}; a training run does not have that yet. Choose another "
            f"{axis}, or call the function yourself"
        )


def apply(axis: str, choice: Choice, inputs: StepInputs) -> Any:
    """The value of a choice on a step; its inputs are bound by name."""
    function = AXES[axis][choice.name]
    values = []
    for name in inputs_of(axis, choice.name):
        value = getattr(inputs, name)
        if value is None:
            raise InputError(f"{axis} {choice.name} needs {name}, which this step does not have")
        values.append(value)
    parameters = {
        key: _now(axis, choice.name, key, value, float(inputs.progress))
        for key, value in choice.parameters.items()
    }
    return function(*values, **parameters)


def scheduled(method: Method, progress: float) -> dict[str, float]:
    """The numbers of a method that change over training, as they are now, for the logs."""
    return {
        f"schedules/{axis}.{key}": float(_now(axis, choice.name, key, value, progress))
        for axis, choice in method.choices.items()
        for key, value in choice.parameters.items()
        if isinstance(value, Schedule)
    }


def _now(axis: str, name: str, key: str, value: Any, progress: float) -> Any:
    """A hyper-parameter at this point of training."""
    if not isinstance(value, Schedule):
        return value
    number = value.at(progress)
    return round(number) if is_whole(axis, name, key) else number
