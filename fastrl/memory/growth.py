"""Timelines of one program on passes of any size, from a few runs of it.

Sizes of tensors are affine functions of the numbers of a pass. The first pass that is asked for is
run; with the second come runs of passes that differ from the first in one number each, and from
then on nothing runs any more. A program whose timeline is not the same for all of them is run every
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastrl.memory.passes import Work
from fastrl.memory.timeline import Timeline, is_alike

STEPS = (1, -1, 1)
"""By which the numbers of a `Work` are changed, in its order."""


class Growth:
    """What is known of a program."""

    def __init__(self, run: Callable[[Work], Timeline], *, is_affine: bool = True) -> None:
        """is_affine: False where sizes depend on more than the numbers of a pass."""
        self.run = run
        self.is_affine = is_affine
        self.base: tuple[Work, Timeline] | None = None
        self.slopes: list[np.ndarray] | None = None  # of each number, (n,)

    def at(self, work: Work) -> Timeline:
        """The timeline of a pass."""
        if self.base is None:
            self.base = work, self.run(work)
        base, timeline = self.base
        if base.numbers == work.numbers and (self.is_affine or _is_same(base, work)):
            return timeline
        if not self.is_affine:
            return self.run(work)
        if self.slopes is None:
            self.slopes = self._find_slopes(base, timeline)
            if self.slopes is None:
                self.is_affine = False
                return self.run(work)
        sizes = timeline.sizes.astype(np.float64)
        changes = zip(work.numbers, base.numbers, self.slopes, strict=True)
        for number, before, slope in changes:
            sizes = sizes + (number - before) * slope
        return timeline.with_sizes(np.rint(sizes).astype(np.int64))

    def _find_slopes(self, base: Work, timeline: Timeline) -> list[np.ndarray] | None:
        found = []
        for index, step in enumerate(STEPS):
            numbers = list(base.numbers)
            numbers[index] += step
            other = self.run(base.with_numbers(numbers))
            if not is_alike(timeline, other):
                return None
            found.append((other.sizes - timeline.sizes) / step)
        return found


def _is_same(first: Work, second: Work) -> bool:
    return _forest(first) == _forest(second)


def _forest(work: Work) -> tuple[Sequence[int], Sequence[int]]:
    return work.segments.lengths.tolist(), work.segments.parents.tolist()
