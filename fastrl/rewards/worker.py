"""The process that calls rewards, and that may be killed at any moment."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress

from fastrl.errors import InputError
from fastrl.example import Example
from fastrl.rewards.calls import Answer, Call, Failure, Ready, Unloadable
from fastrl.rewards.channel import Channel
from fastrl.rewards.function import RewardFunction
from fastrl.rewards.load import load_function_of
from fastrl.rewards.progress import Progress
from fastrl.tasks import Task

ANSWER_SECONDS = 0.005  # answers are kept this long at most, so that little is lost with a worker
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def work(
    channel: Channel, progress: Progress, specs: Sequence[str], task: Task | None, parent: int
) -> None:
    """Load the rewards, then answer batches of calls until the supervisor hangs up."""
    os.setsid()  # so that what a reward starts is killed with it
    _die_with(parent)
    _be_first_out_of_memory()
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a kill loses less
    try:
        rewards = [load_function_of(spec, task) for spec in specs]
    except Exception as error:
        channel.send(Unloadable(failure_of(error)))
        return
    channel.send(Ready(tuple(reward.is_deterministic for reward in rewards)))
    functions = [reward.function for reward in rewards]
    with suppress(EOFError):
        while True:
            for calls in channel.receive():
                _answer_all(channel, progress, functions, calls)


def failure_of(error: Exception) -> Failure:
    """What can be told of an exception in another process."""
    lines = traceback.format_exception(error)
    return Failure(str(error), "".join(lines)[-10_000:], isinstance(error, InputError))


class _Answers:
    """Answers on their way to the supervisor, a few at a time."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._kept: list[Answer] = []
        self._sent = time.monotonic()

    def add(self, answer: Answer) -> None:
        """Keep an answer, with the scores before it if it is scores."""
        if self._kept and answer.failure is None and self._kept[-1].failure is None:
            last = self._kept.pop()
            answer = Answer(last.tickets + answer.tickets, last.scores + answer.scores)
        self._kept.append(answer)

    def send(self, now: float) -> None:
        """Send what is there."""
        if self._kept:
            self._channel.send(self._kept)
        self._kept, self._sent = [], now

    def send_if_old(self, now: float) -> None:
        """Send what is there unless that was done a moment ago."""
        if now - self._sent > ANSWER_SECONDS:
            self.send(now)


def _answer_all(
    channel: Channel,
    progress: Progress,
    functions: Sequence[RewardFunction],
    calls: Sequence[Call],
) -> None:
    """Make the calls one after the other, noting each before it is made."""
    answers = _Answers(channel)
    position = 0
    for call in calls:
        loaded: dict[bytes, Example] = {}
        width = len(call.tickets) if call.is_together else 1
        for start in range(0, len(call.tickets), width):
            answers.send_if_old(time.monotonic())
            progress.note(position)
            answers.add(_answer(functions[call.reward], call.rows(start, start + width), loaded))
            if not channel.is_open:
                os._exit(1)  # while `progress` still names the call that closed it
            position += width
    answers.send(time.monotonic())


def _answer(function: RewardFunction, call: Call, loaded: dict[bytes, Example]) -> Answer:
    try:
        examples = [_example(data, loaded) for data in call.examples]
        scores = function(examples, call.texts, call.completion_ids)
    except MemoryError:
        os._exit(1)  # a crash: this process may lack what it takes to go on
    except Exception as error:
        if isinstance(error.__cause__, MemoryError):
            os._exit(1)
        return Answer(call.tickets, (), failure=failure_of(error))
    return Answer(call.tickets, tuple(scores))


def _example(data: bytes, loaded: dict[bytes, Example]) -> Example:
    if data not in loaded:
        try:
            loaded[data] = pickle.loads(data)
        except Exception as error:
            raise InputError(
                f"an example cannot be read in a reward worker: {type(error).__name__}: {error}; "
                "let its columns hold plain data"
            ) from error
    return loaded[data]


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent is gone, whatever it is doing then."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before it was asked for
        os._exit(1)


def _be_first_out_of_memory() -> None:
    """A reward that takes all memory should not cost the training process its life."""
    if sys.platform == "linux":
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
