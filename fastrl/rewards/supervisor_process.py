"""A pool's supervisor as the training process sees it: how it starts, how it ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import weakref
from typing import Any

from fastrl.errors import InputError
from fastrl.rewards.calls import Settings
from fastrl.rewards.channel import Channel
from fastrl.rewards.supervisor import LOAD_ATTEMPTS

START_SECONDS = 300.0  # for what a supervisor loads before its workers
STOP_SECONDS = 5.0  # for a supervisor that was told to end to have ended
COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fastrl.rewards.supervisor import main; main(int(sys.argv[2]))"
)
# Workers are as many as are to run at a time: threads of their own would only get in the way.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class SupervisorProcess:
    """A fresh Python process: no fork of this one, which may have threads and a GPU.

    It has a session of its own, so that Ctrl-C reaches the training process alone, which then
    decides. It ends with `close`, with this object and with this process, whichever ends first,
    and however this process ends.
    """

    def __init__(self, settings: Settings) -> None:
        ours, theirs = socket.socketpair()
        path = json.dumps([str(entry) for entry in sys.path])
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, path, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.channel = Channel(ours)
        self.close = weakref.finalize(self, _stop, process, self.channel)
        self._process = process
        self._start_seconds = START_SECONDS + LOAD_ATTEMPTS * settings.load_seconds
        self.channel.send(settings)

    def send(self, message: Any) -> None:
        """Tell it something; it always listens."""
        try:
            self.channel.send(message)
        except ConnectionError as error:
            raise self._ended() from error

    def receive(self, *, is_loading: bool = False) -> list[Any]:
        """The messages of one read, waiting for it; while it loads, not for ever."""
        self.channel.socket.settimeout(self._start_seconds if is_loading else None)
        try:
            return self.channel.receive()
        except TimeoutError as error:
            raise InputError(
                f"the reward workers took over {self._start_seconds:g} s to start; the task of the "
                "reward 'task' may be slow to load"
            ) from error
        except EOFError as error:
            raise self._ended() from error

    def _ended(self) -> RuntimeError:
        code = self._process.wait(STOP_SECONDS)
        return RuntimeError(f"the supervisor of the reward workers ended with exit code {code}")


def _stop(process: subprocess.Popen[bytes], channel: Channel) -> None:
    """Hang up, upon which it kills its workers and ends."""
    channel.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
