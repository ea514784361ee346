"""Every byte that torch's CPU allocator hands out, cut into named spans of the program.

The profiler hears of every block, inside operations and in the backward pass too, with its size and
its time. What is counted is absolute: all that was handed out since the trace began and has not
come back. Blocks of before, and those of other libraries, are not seen.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._C._profiler import RecordScope
from torch.autograd.profiler import record_function

MARK = "phase "
"""What the names of spans begin with among the profiler's events."""


class Moment(NamedTuple):
    """Something that happened at a time."""

    time: int  # ns
    change: int  # bytes
    begins: str | None = None
    ends: bool = False


class Trace:
    """Most bytes in use in each span; of nested spans the innermost counts."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        """By the name of the span; a span may come several times."""
        self.highest = 0
        """Of all that was traced, spans or not."""
        self.remaining = 0
        """Bytes in use at the end."""

    def read(self, moments: list[Moment]) -> None:
        """Go through what happened in its order."""
        in_use, spans = 0, [""]
        for moment in moments:
            in_use += moment.change
            if moment.begins is not None:
                spans.append(moment.begins)
            self.highest = max(self.highest, in_use)
            self.peaks[spans[-1]] = max(self.peaks.get(spans[-1], 0), in_use)
            if moment.ends:  # what is in use is what the outer one goes on with
                spans.pop()
                self.peaks[spans[-1]] = max(self.peaks.get(spans[-1], 0), in_use)
        self.remaining = in_use


@contextmanager
def traced() -> Iterator[Trace]:
    """A trace of the block, which can be read after it.

    Operations are not recorded, only memory and spans: `torch.profiler` has no such setting, and
    the events of a few hundred thousand operations would take most of the time.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start and stop otherwise
    profiler, autograd = torch._C._profiler, torch._C._autograd
    config = profiler.ProfilerConfig(
        profiler.ProfilerState.KINETO, False, True, False, False, False,
        profiler._ExperimentalConfig(),
    )  # fmt: skip
    activities = {profiler.ProfilerActivity.CPU}
    found = Trace()
    gc.freeze()  # only what the block leaves behind is looked for at its end
    autograd._prepare_profiler(config, activities)
    autograd._enable_profiler(config, activities, {RecordScope.USER_SCOPE})
    try:
        yield found
        gc.collect()  # what is freed after the trace would be missing in the next one
    finally:
        events = autograd._disable_profiler().events()
        gc.unfreeze()
    found.read(_moments(events))


@contextmanager
def span(name: str) -> Iterator[None]:
    """What happens within belongs to `name`."""
    with record_function(MARK + name):
        yield


def mark(owner: Any, method: str, name: str) -> None:
    """From now on every call of the method, of an object or of a class, is a span."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return original(*args, **kwargs)

    setattr(owner, method, marked)


def _moments(events: Any) -> list[Moment]:
    """In the order of time; a span that begins and ends with a block has it inside."""
    found = []
    for event in events:
        name = event.name()
        if name == "[memory]":
            found.append(Moment(event.start_ns(), event.nbytes()))
        elif name.startswith(MARK):
            name = name.removeprefix(MARK)
            found.append(Moment(event.start_ns(), 0, begins=name))
            found.append(Moment(event.end_ns(), 0, ends=True))
    return sorted(found, key=lambda moment: (moment.time, moment.ends))
