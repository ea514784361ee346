"""Ctrl-C and SIGTERM as requests to stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The user asked to stop; a checkpoint has been written."""


class StopRequest:
    """Whether one came."""

    requested = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """The first Ctrl-C asks for a stop after the current step; the second one aborts at once.

    SIGTERM, by which a machine is taken away or a job ends, is the same request.
    """
    stop = StopRequest()

    def on_interrupt(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    previous = {number: signal.signal(number, on_interrupt) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
