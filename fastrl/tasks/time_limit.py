"""A time limit for verifiers, which evaluate whatever expression a model wrote.

It ends a block of Python and costs nothing. What never returns to Python, or catches all it can, is
left to the limit of a RewardPool, which ends the process.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeLimitExceeded(BaseException):
    """The block took too long. Not an Exception: third-party `except Exception` must not eat it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExceeded in the block after `seconds` of wall-clock time.

    It needs the alarm signal, which only the main thread of a POSIX system has; elsewhere the
    block runs without a limit.
    """
    if not hasattr(signal, "SIGALRM") or not is_main_thread():
        yield
        return

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeLimitExceeded

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def is_main_thread() -> bool:
    """Whether signal handlers, and with them time limits, can be installed here."""
    return threading.current_thread() is threading.main_thread()
