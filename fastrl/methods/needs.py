"""What a training step has to do for a method, read off its choices."""

from __future__ import annotations

from fastrl.methods.axes import inputs_of
from fastrl.methods.inputs import PER_TOKEN
from fastrl.methods.record import Method
from fastrl.sequence_surrogates import SEQUENCE_SURROGATES

ESTIMATES = ("reward_shaping", "token_reward_shaping", "advantage", "selection", "value_loss")
"""Axes of what is computed once a step, before its first update."""
OF_TOKENS = PER_TOKEN | {"advantages"}
"""What a choice asks for that has one value for each token."""


def needs_reference(method: Method) -> bool:
    """Whether a run keeps the policy that it starts from."""
    return "ref_logps" in requirements(method)


def looks_past_tokens(method: Method) -> bool:
    """Whether a step needs log-probabilities of all tokens before its first backward pass."""
    if method.loss is not None or method.surrogate.name in SEQUENCE_SURROGATES:
        return True
    asked = {
        name
        for axis, choice in method.choices.items()
        if axis not in ("surrogate", "reference_update")
        for name in inputs_of(axis, choice.name)
    }
    rules = [penalty.tokens for penalty in method.penalties if penalty.tokens is not None]
    return bool(asked & OF_TOKENS) or bool(rules) or method.computed is not None


CURRENT = frozenset({"logps", "entropies", "sum_p2", "sum_p3", "clipped", "squared_hidden_norms"})
"""Inputs that the policy gives anew after every update."""


def needs_view(method: Method) -> bool:
    """Whether the loss of any update takes a look at all of its tokens by the current policy.

    Rewards, advantages and selections do not count: they were made before the first update of the
    step, for which `looks_past_tokens` decides.
    """
    asked: set[str] = set()
    for axis, choice in method.choices.items():
        is_of_tokens = axis == "surrogate" and choice.name not in SEQUENCE_SURROGATES
        if axis not in ESTIMATES and not is_of_tokens:
            asked |= set(inputs_of(axis, choice.name))
    for penalty in method.penalties:
        if penalty.tokens is not None:
            asked |= set(inputs_of("tokens", penalty.tokens.name))
    return bool(asked & CURRENT)


def estimates_from_tokens(method: Method) -> bool:
    """Whether rewards, advantages or the selection are computed from tokens."""
    chosen = method.choices
    asked = {
        name for axis in ESTIMATES if axis in chosen for name in inputs_of(axis, chosen[axis].name)
    }
    return bool(asked & OF_TOKENS)


def selects_before_tokens(method: Method) -> bool:
    """Whether it is known before any token is looked at which completions are kept."""
    if method.selection is None:
        return False
    asked = set(inputs_of("selection", method.selection.name))
    if method.reward_shaping is not None:
        asked |= set(inputs_of("reward_shaping", method.reward_shaping.name))
    if "completion_advantages" in asked:
        asked |= set(inputs_of("advantage", method.advantage.name))
    return not asked & OF_TOKENS


LEARN_WITHOUT_ADVANTAGE = frozenset({"kl_penalised_ratio", "log_likelihood", "mirror_descent"})
"""Surrogates with a slope where the advantage is zero: a penalty inside, or no advantage at all."""


def counts_every_completion(method: Method) -> bool:
    """Whether completions without an advantage still have a part in what is computed."""
    has_penalty = bool(method.penalties) or method.entropy_coef > 0 or bool(method.controllers)
    batch_wide = method.loss is not None or method.token_weights is not None
    batch_wide = batch_wide or method.computed is not None or estimates_from_tokens(method)
    return has_penalty or batch_wide or method.surrogate.name in LEARN_WITHOUT_ADVANTAGE


def requirements(method: Method) -> frozenset[str]:
    """Names of all inputs that the method's choices ask a step for."""
    found: set[str] = set()
    for axis, choice in method.choices.items():
        found |= set(inputs_of(axis, choice.name))
    for penalty in method.penalties:
        found |= set(inputs_of("regulariser", penalty.regulariser.name))
        if penalty.tokens is not None:
            found |= set(inputs_of("tokens", penalty.tokens.name))
    return frozenset(found)
