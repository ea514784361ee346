"""What a policy-optimisation method is: a choice on every axis, with its numbers and its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastrl.value_losses import TRAINING

TAKE_ADVANTAGES = ("optimal_advantage_regression",)
"""Losses of completions that are given their advantages; others have rewards or pairs."""


@dataclass(frozen=True)
class Choice:
    """A function of an axis by name, with the hyper-parameters that differ from its own.

    Those of a selection or of token weights may be a `fastrl.schedules.Schedule`.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = ", ".join(f"{name}={number(value)}" for name, value in self.parameters.items())
        return f"{self.name}({given})" if given else self.name


def number(value: Any) -> str:
    """A hyper-parameter as one writes it; a schedule is its words."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def use(name: str, **parameters: Any) -> Choice:
    """A choice, as the records write it."""
    return Choice(name, parameters)


def training_parameter(value_loss: Choice, name: str) -> float:
    """One of what belongs to the training of a value model, see `fastrl.value_losses.TRAINING`."""
    return float(value_loss.parameters.get(name, TRAINING[name]))


@dataclass(frozen=True)
class Penalty:
    """A regulariser with its weight, on every token or on those that a rule picks."""

    regulariser: Choice
    beta: float
    tokens: Choice | None = None

    def __str__(self) -> str:
        where = f" on {self.tokens}" if self.tokens else ""
        return f"{self.beta:g} {self.regulariser}{where}"


@dataclass(frozen=True)
class Method:
    """One policy-optimisation method; the defaults are those of most methods."""

    name: str
    source: str
    formula: str
    reward_shaping: Choice | None = None
    token_reward_shaping: Choice | None = None
    """What becomes of the rewards of single tokens after that; for both, or for one kind twice."""
    advantage: Choice = field(default_factory=lambda: use("group_relative"))
    selection: Choice | None = None
    token_weights: Choice | None = None
    surrogate: Choice = field(
        default_factory=lambda: use("clipped_ratio", epsilon_low=0.2, epsilon_high=0.2)
    )
    prompt_values: Choice | None = None
    """What is found out about prompts beside their own group, see `fastrl.values`."""
    computed: Choice | None = None
    """Where hyper-parameters of the surrogate come from the batch: a rule that returns them."""
    penalties: tuple[Penalty, ...] = ()
    rollout_correction: Choice | None = None
    ratio_to_sampler: bool = False
    """The old policy is the one that sampled, by its own log-probabilities: one ratio for both."""
    aggregation: Choice = field(default_factory=lambda: use("token_mean"))
    loss: Choice | None = None
    """A loss of pairs, lists or single completions; it stands in for the advantage, the token
    weights, the surrogate and its correction."""
    pairing: str | None = None
    value_loss: Choice | None = None
    """What the value model is trained on, with what belongs to its training, see
    `fastrl.value_losses`; None of a method that has no value model."""
    value_tokens: Literal["all", "finished"] = "all"
    """The tokens that the value model learns from: all, or those of completions that ended."""
    reference_update: Choice | None = None
    """When and how far the reference follows the policy, see `fastrl.weight_moves`."""
    look_ahead: Choice | None = None
    """Fast iterations, a move back towards where they began, and a slow one."""
    entropy_coef: float = 0.0
    controllers: tuple[Choice, ...] = ()
    """What moves coefficients from step to step, see `fastrl.methods.adaptation`."""
    mask_truncated_completions: bool = False
    advantage_after_selection: bool = False
    """Advantages are of the completions that are kept, among themselves."""
    denominator: Literal["kept", "masked"] | None = None
    """Whether tokens of weight 0 count in averages; by default as published, see
    `fastrl.token_weights.LEAVES_DENOMINATOR`."""
    dynamic_sampling: bool = False
    """Prompts of which the selection keeps nothing are replaced by others before the update."""
    max_sampling_rounds: int = 10
    """With dynamic sampling: how often prompts are sampled at most before a step is trained."""
    draws_turn: bool = False
    """Trains on one turn of every conversation, drawn by chance, for how the conversation ends;
    other methods refuse conversations of several turns."""
    scores_from: Literal["auto", "sampler", "policy"] = "auto"
    """Whose entropies pick tokens, see `fastrl.down_sampling`."""
    max_pass_rate: float | None = None
    """A prompt that passed so often, of all its completions so far, is never asked again."""
    thinking: Choice | None = None
    """What becomes of completions that think for too long, see `fastrl.thinking`."""
    settings: str = ""
    """Published settings outside of the loss: generations, batch, learning rate."""
    missing: str = ""
    """What the published method has and this record lacks; it cannot be trained without."""
    unverified: str = ""
    """Constants that were not found in a paper or in its authors' code."""

    @property
    def has_advantage(self) -> bool:
        """Whether an advantage has a part in the loss."""
        return self.loss is None or self.loss.name in TAKE_ADVANTAGES

    @property
    def choices(self) -> dict[str, Choice]:
        """The choices that are in effect, by axis; penalties apart."""
        axes = ["prompt_values", "reward_shaping", "token_reward_shaping", "selection"]
        axes += ["aggregation"]
        if self.loss is not None:
            axes += ["loss", "advantage"] if self.has_advantage else ["loss"]
        else:
            axes += ["advantage", "token_weights", "surrogate", "computed", "rollout_correction"]
            axes += ["value_loss"]
        axes += ["reference_update", "look_ahead", "thinking"]
        found = {axis: getattr(self, axis) for axis in axes}
        return {axis: choice for axis, choice in found.items() if choice is not None}
