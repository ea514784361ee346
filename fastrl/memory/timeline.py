"""What was made and freed in what order, and the moment at which most was there.

Legend: n storages, E events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

BLOCK = {"cpu": 1, "cuda": 512}
"""Bytes that a block of the device's allocator is a multiple of."""


class Pulse(NamedTuple):
    """Bytes that were taken and given back between two events."""

    position: int  # how many events were before it
    part: str
    num_bytes: int
    again: Callable[[Any], int] | None = None
    """The same on other work; None where it does not matter."""


class Mark(NamedTuple):
    """Where something begins."""

    position: int  # how many events were before it
    num_pulses: int  # likewise
    name: str


class Moment(NamedTuple):
    """Where most was in use."""

    total: int
    parts: Mapping[str, int]


class Window(NamedTuple):
    """A stretch of a timeline between two marks."""

    name: str
    highest: Moment


class Timeline(NamedTuple):
    """A recording that is over."""

    device: str
    sizes: np.ndarray  # (n,) bytes that were asked for
    parts: tuple[str, ...]  # n
    events: np.ndarray  # (E,): 1 + the number of a storage that is made, minus that for one freed
    pulses: tuple[Pulse, ...]
    marks: tuple[Mark, ...]

    def with_sizes(self, sizes: np.ndarray) -> Timeline:
        """The same program on other work."""
        return self._replace(sizes=sizes)

    def windows(self, work: Any = None) -> list[Window]:
        """The highest moment after each mark; `work` is what pulses are functions of."""
        blocks = self._blocks()
        levels, heights = self._levels(blocks), self._heights(work)
        borders = [*self.marks, Mark(len(self.events), len(self.pulses), "")]
        return [
            Window(start.name, self._highest(levels, heights, blocks, start, end))
            for start, end in pairwise(borders)
        ]

    def peak(self, work: Any = None) -> Moment:
        """The highest moment of all."""
        blocks = self._blocks()
        start, end = Mark(0, 0, ""), Mark(len(self.events), len(self.pulses), "")
        return self._highest(self._levels(blocks), self._heights(work), blocks, start, end)

    def _blocks(self) -> np.ndarray:
        size = BLOCK[self.device]
        return self.sizes if size == 1 else -(-self.sizes // size) * size

    def _levels(self, blocks: np.ndarray) -> np.ndarray:
        """(E + 1,) bytes in use before the first event and after each."""
        changes = np.sign(self.events) * blocks[np.abs(self.events) - 1]
        return np.concatenate([[0], np.cumsum(changes)])

    def _heights(self, work: Any) -> list[int]:
        """Bytes of the pulses, those of layers that are alike found out once."""
        known: dict[Any, int] = {}
        found = []
        for pulse in self.pulses:
            if work is None or pulse.again is None:
                found.append(pulse.num_bytes)
                continue
            if pulse.again not in known:
                known[pulse.again] = pulse.again(work)
            found.append(known[pulse.again])
        return found

    def _highest(
        self, levels: np.ndarray, heights: list[int], blocks: np.ndarray, start: Mark, end: Mark
    ) -> Moment:
        position = start.position + int(np.argmax(levels[start.position : end.position + 1]))
        total, part, extra = int(levels[position]), "", 0
        stretch = slice(start.num_pulses, end.num_pulses)
        for pulse, size in zip(self.pulses[stretch], heights[stretch], strict=True):
            if levels[pulse.position] + size > total:
                position, part, extra = pulse.position, pulse.part, size
                total = int(levels[position]) + size
        alive = np.zeros(len(blocks), dtype=bool)
        events = self.events[:position]
        alive[events[events > 0] - 1] = True
        alive[-events[events < 0] - 1] = False
        parts: dict[str, int] = {}
        for number in np.flatnonzero(alive).tolist():
            name = self.parts[number]
            parts[name] = parts.get(name, 0) + int(blocks[number])
        if extra:
            parts[part] = parts.get(part, 0) + extra
        return Moment(total, parts)


class Recording:
    """A timeline in the making."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.sizes: list[int] = []
        self.parts: list[str] = []
        self.events: list[int] = []
        self.pulses: list[Pulse] = []
        self.marks: list[Mark] = []
        self.in_use = 0

    @property
    def now(self) -> int:
        """Events so far."""
        return len(self.events)

    def add(self, num_bytes: int, part: str) -> int:
        """A storage is made; returns its number."""
        self.sizes.append(num_bytes)
        self.parts.append(part)
        self.events.append(len(self.sizes))
        self.in_use += num_bytes
        return len(self.sizes) - 1

    def free(self, number: int) -> None:
        """A storage is gone."""
        self.events.append(-number - 1)
        self.in_use -= self.sizes[number]

    def enlarge(self, number: int, num_bytes: int) -> None:
        """A storage takes more than was said when it was made."""
        self.sizes[number] += num_bytes
        self.in_use += num_bytes

    def timeline(self) -> Timeline:
        """All of it so far."""
        return Timeline(
            self.device, np.array(self.sizes, dtype=np.int64), tuple(self.parts),
            np.array(self.events, dtype=np.int64), tuple(self.pulses), tuple(self.marks),
        )  # fmt: skip


def is_alike(first: Timeline, second: Timeline) -> bool:
    """Whether two timelines are of one program, on work of different sizes."""
    return (
        first.parts == second.parts
        and np.array_equal(first.events, second.events)
        and [x[:2] for x in first.pulses] == [x[:2] for x in second.pulses]
        and first.marks == second.marks
    )
