"""What a worker notes and its supervisor reads while it is being noted."""

import os
import signal
import time

from fastrl.rewards.progress import NOT_BEGUN, Progress


def test_a_call_and_when_it_began():
    progress = Progress()
    assert progress.read().position == NOT_BEGUN
    before = time.monotonic()
    progress.note(4711)
    position, seconds = progress.read()
    assert position == 4711
    assert before - 0.001 <= seconds <= time.monotonic()


def test_no_reader_meets_half_of_a_note():
    """Half of one looks like a call that began long ago, for which a worker is ended."""
    progress = Progress()
    progress.note(1)
    began = progress.read().seconds
    pid = os.fork()
    if pid == 0:
        position = 1
        while True:
            position = position % 1_000_000 + 1
            progress.note(position)
    try:
        for _ in range(300_000):
            position, seconds = progress.read()
            assert 1 <= position <= 1_000_000
            assert began <= seconds <= time.monotonic()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
