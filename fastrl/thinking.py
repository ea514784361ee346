"""Completions that think for too long: the choices of a method's axis `thinking`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fastrl.errors import InputError

if TYPE_CHECKING:
    from fastrl.methods.record import Method

TIME_IS_UP = "Okay, time is up. Let me stop thinking and formulate a final answer now. </think>"


class ThinkingLimit(NamedTuple):
    """Settings of `forced_end`."""

    min_thinking_tokens: int
    max_thinking_tokens: int
    phrase: str
    end_of_thinking: str


def forced_end(
    *, min_thinking_tokens: int = 10240, max_thinking_tokens: int = 12288,
    phrase: str = TIME_IS_UP, end_of_thinking: str = "</think>",
) -> ThinkingLimit | None:  # fmt: skip
    """A phrase ends the thinking of completions that take too long (ScaleRL, arXiv:2510.13786).

    Each completion draws its limit, min_thinking_tokens to max_thinking_tokens, both included. If
    by then it has neither ended nor written end_of_thinking, the phrase stands behind it, and it
    goes on from there to rollout.max_completion_length. The phrase is not trained: nobody drew it.
    max_thinking_tokens 0: no limit.
    """
    if max_thinking_tokens == 0:
        return None
    if not 0 <= min_thinking_tokens <= max_thinking_tokens:
        raise InputError(
            "expected 0 <= min_thinking_tokens <= max_thinking_tokens, got "
            f"{min_thinking_tokens} and {max_thinking_tokens}; set objective.parameters"
        )
    if not end_of_thinking or end_of_thinking not in phrase:
        raise InputError(
            f"the phrase must hold end_of_thinking, {end_of_thinking!r}, or thinking would go on "
            f"behind it, got {phrase!r}; set objective.parameters.phrase"
        )
    return ThinkingLimit(min_thinking_tokens, max_thinking_tokens, phrase, end_of_thinking)


THINKING: dict[str, Callable[..., ThinkingLimit | None]] = {"forced_end": forced_end}


def thinking_limit(method: Method) -> ThinkingLimit | None:
    """What a method says of completions that think for too long; None for nothing."""
    if method.thinking is None:
        return None
    return THINKING[method.thinking.name](**method.thinking.parameters)
