"""Numbers that change over training, as functions of how far it is.

progress: steps done over all steps, in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastrl.errors import InputError, nearest


def constant(progress: float) -> float:
    """Stays at the start."""
    return 0.0


def linear(progress: float) -> float:
    """As far as training is."""
    return progress


def cosine(progress: float) -> float:
    """Slow at both ends: half a period of a cosine."""
    return (1 - math.cos(math.pi * progress)) / 2


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}
"""How much of the way from the first value to the last one is done."""


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end` while progress goes from `begins` to `ends`."""

    shape: str
    start: float
    end: float
    begins: float = 0.0
    ends: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise InputError(f"unknown schedule {self.shape!r}; {nearest(self.shape, [*SHAPES])}")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise InputError(f"a schedule takes finite numbers, got {self}")
        if not 0 <= self.begins < self.ends <= 1:
            raise InputError(
                f"a schedule must begin before it ends, both as fractions of training, got begin "
                f"{self.begins:g} and end {self.ends:g}"
            )

    def at(self, progress: float) -> float:
        """The number after this fraction of the steps; it rests before `begins` and from `ends`."""
        done = (progress - self.begins) / (self.ends - self.begins)
        share = SHAPES[self.shape](min(max(done, 0.0), 1.0))
        return (1 - share) * self.start + share * self.end

    def __str__(self) -> str:
        numbers = [self.start]
        if self.shape != "constant":
            numbers += [self.end]
        if (self.begins, self.ends) != (0.0, 1.0):
            numbers += [self.begins, self.ends]
        return " ".join([self.shape, *(f"{number:g}" for number in numbers)])


def read_schedule(text: str) -> Schedule:
    """A schedule in words: "constant 0.2", "linear 0.2 1" or "cosine 0.2 1 0.1 0.8".

    The last two numbers, 0 and 1 if they are not given, are where it begins and ends.
    """
    shape, *words = text.split() or [""]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if shape == "constant" and len(numbers) == 1:
        return Schedule(shape, numbers[0], numbers[0])
    if shape == "constant" or (shape in SHAPES and len(numbers) not in (2, 4)):
        raise InputError(
            "expected a number or a schedule such as 'constant 0.2', 'linear 0.2 1' or "
            f"'cosine 0.2 1 0.1 0.8' (from, to and, of training, begin and end), got {text!r}"
        )
    if shape not in SHAPES:
        raise InputError(
            f"expected a number or a schedule, got {text!r}: unknown schedule {shape!r}; "
            f"{nearest(shape, [*SHAPES])}"
        )
    return Schedule(shape, *numbers)
