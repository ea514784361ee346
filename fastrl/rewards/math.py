"""The reward for mathematics: math-verify decides whether two expressions are equal."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from fastrl.example import Example
from fastrl.tasks.time_limit import is_main_thread

TIMEOUT_SECONDS = 3  # per parse and per comparison; whole seconds, as signal.alarm takes
LARGEST_EXPONENT = 30  # of ten, up to which a number is written out
DELIMITERS = ("$", "\\boxed", "\\(", "\\[")


def math_reward(
    examples: Sequence[Example], texts: Sequence[str], completion_ids: Sequence[list[int]]
) -> list[float | None]:
    """1.0 where the completion's last expression equals the example's answer, else 0.0.

    None where the example has no answer, or one in which math-verify finds no expression.
    math-verify logs a timeout or an unreadable expression and counts it as unequal; outside the
    main thread it has no timeouts.
    """
    from math_verify import parse, verify

    timeout = TIMEOUT_SECONDS if is_main_thread() else None
    golds: dict[str, list[Any]] = {}
    scores: list[float | None] = []
    for example, text in zip(examples, texts, strict=True):
        if example.answer is None:
            scores.append(None)
            continue
        if example.answer not in golds:
            golds[example.answer] = parse(as_latex(example.answer), parsing_timeout=timeout)
        gold = golds[example.answer]
        if not gold:
            scores.append(None)
            continue
        target = parse(text, parsing_timeout=timeout)
        scores.append(float(verify(gold, target, timeout_seconds=timeout)))
    return scores


def as_latex(answer: str) -> str:
    """The answer between dollars unless it marks its mathematics itself.

    Without them math-verify looks for plain numbers only and reads (1, 2) as 2; with them it reads
    1e-3 as e - 3, so numbers lose their exponent first.
    """
    if any(delimiter in answer for delimiter in DELIMITERS):
        return answer
    try:
        number = Decimal(answer.strip())
    except InvalidOperation:
        return f"${answer}$"
    if not number.is_finite() or abs(number.adjusted()) > LARGEST_EXPONENT:
        return f"${answer}$"
    return f"${number:f}$"
