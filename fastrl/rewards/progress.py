"""How far a worker is, in memory that it shares with its supervisor."""

from __future__ import annotations

import mmap
import time
from typing import NamedTuple

NOT_BEGUN = -1
POSITION_BITS = 24  # of the 63 below the sign; the others hold milliseconds, for 17 years


class Moment(NamedTuple):
    """A call of a batch: the first of its completions, of all of the batch, and its beginning.

    position is NOT_BEGUN before the first call, when the batch was handed out. seconds: monotonic.
    """

    position: int
    seconds: float


class Progress:
    """The call that a worker makes or has just made.

    Both numbers are one aligned word, written at once: a reader that caught one of them old, or
    half of it, would end a worker that does its work.
    """

    def __init__(self) -> None:
        self._word = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        self.note(NOT_BEGUN)

    def note(self, position: int) -> None:
        """This call begins now."""
        milliseconds = int(time.monotonic() * 1000)
        self._word[0] = milliseconds << POSITION_BITS | (position + 1)

    def read(self) -> Moment:
        """The last that was noted."""
        word = self._word[0]
        position = (word & ((1 << POSITION_BITS) - 1)) - 1
        return Moment(position, (word >> POSITION_BITS) / 1000)
