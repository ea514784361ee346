"""A worker as its supervisor sees it: what it was given, how far it is, and its end."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from fastrl.rewards.calls import Answer, Call, Ready, Settings, Unloadable
from fastrl.rewards.channel import Channel
from fastrl.rewards.progress import NOT_BEGUN, Progress
from fastrl.rewards.worker import work
from fastrl.tasks import Task


class Closable(Protocol):
    """A socket, a channel or a selector."""

    def close(self) -> None: ...


class WorkerProcess:
    """A worker and the batch of calls it works on."""

    def __init__(self, pid: int, channel: Channel, progress: Progress, load_seconds: float) -> None:
        self.pid = pid
        self.channel = channel
        self.calls: list[Call] = []
        self.num_answered = 0  # completions
        self._num_given = 0  # likewise
        self.is_loading = True
        self.has_hung_up = False
        self._progress = progress
        self._load_deadline = time.monotonic() + load_seconds

    @property
    def is_idle(self) -> bool:
        """Whether it can take calls."""
        return not self.is_loading and self.num_answered == self._num_given

    @property
    def current(self) -> int:
        """The first completion, of all of its batch, of the call it makes or has just made.

        NOT_BEGUN where it has yet to make one.
        """
        return self._progress.read().position

    def deadline(self, timeout_s: float) -> float | None:
        """When it is late (monotonic seconds); None where nothing is asked of it."""
        if self.is_loading:
            return self._load_deadline
        if self.is_idle:
            return None
        return self._progress.read().seconds + timeout_s

    def give(self, calls: list[Call]) -> None:
        """Let it work on these."""
        self.calls, self.num_answered = calls, 0
        self._num_given = sum(len(call.tickets) for call in calls)
        self._progress.note(NOT_BEGUN)
        with suppress(ConnectionError):  # its death will be noticed
            self.channel.send(calls)

    def write(self) -> None:
        """Send what its socket had no room for."""
        with suppress(ConnectionError):
            self.channel.flush()

    def read(self) -> list[list[Answer] | Ready | Unloadable]:
        """All that it has said since."""
        messages: list[Any] = []
        try:
            while received := self.channel.receive():
                messages += received
        except EOFError:
            self.has_hung_up = True
        for message in messages:
            if isinstance(message, Ready):
                self.is_loading = False
            elif isinstance(message, list):
                self.num_answered += sum(len(answer.tickets) for answer in message)
        return messages

    def kill(self) -> None:
        """End it and all that it started, without asking: a reward can refuse any request."""
        for kill in (os.kill, os.killpg):  # its group is its own once it has begun to work
            with suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)


def start_worker(
    settings: Settings, task: Task | None, others: Sequence[Closable]
) -> WorkerProcess:
    """A fork of this process, which has one thread, no torch and nothing of the user's.

    others: what the worker has no business with.
    """
    ours, theirs = socket.socketpair()
    progress = Progress()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(signal.set_wakeup_fd(-1))
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for item in (ours, *others):
                item.close()
            work(Channel(theirs), progress, settings.specs, task, parent)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    theirs.close()
    ours.setblocking(False)
    return WorkerProcess(pid, Channel(ours), progress, settings.load_seconds)
