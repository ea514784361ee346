"""The process between a pool and its workers: hands out calls, ends and replaces what hangs.

It runs no code of the user's and reads whenever there is something to read, so that neither a
reward nor a training process that is busy for minutes can hold up a time limit.
"""

from __future__ import annotations

import gc
import os
import pickle
import selectors
import signal
import socket
import time
from collections import deque
from contextlib import suppress

from fastrl.errors import InputError
from fastrl.rewards.calls import Answer, Call, Failure, Ready, Settings, Unloadable, lost
from fastrl.rewards.channel import Channel
from fastrl.rewards.progress import NOT_BEGUN
from fastrl.rewards.worker import failure_of
from fastrl.rewards.worker_process import Closable, WorkerProcess, start_worker
from fastrl.tasks import Task

LOAD_ATTEMPTS = 3  # how many workers in a row may end before they make a call
BATCH = 64  # calls sent to a worker at a time, at most
STOP_SECONDS = 2.0  # for killed workers to be gone


def main(descriptor: int) -> None:
    """Serve the pool at the other end of the socket until it hangs up, then leave nothing."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whatever the pool's thread had blocked
    channel = Channel(socket.socket(fileno=descriptor))
    messages: list[Settings] = []
    while not messages:
        messages = channel.receive()
    settings = messages[0]
    try:
        task = _load_task(settings)
    except Exception as error:
        channel.send(Unloadable(failure_of(error)))
        return
    gc.collect()
    gc.freeze()  # what is loaded stays in the memory that workers share
    supervisor = Supervisor(channel, settings, task)
    try:
        with suppress(EOFError, ConnectionError):
            while True:
                supervisor.turn()
    finally:
        supervisor.stop()
    os._exit(0)  # there is nothing to tidy up, which takes longer than all that came before


def _load_task(settings: Settings) -> Task | None:
    """What built-in rewards need, once for all workers."""
    if "math" in settings.specs:
        import math_verify  # noqa: F401
    if settings.load_task is None:
        return None
    task: Task = pickle.loads(settings.load_task)()
    return task


class Supervisor:
    """The calls that wait, the workers, and who is doing what since when."""

    def __init__(self, pool: Channel, settings: Settings, task: Task | None) -> None:
        self.pool = pool
        self.settings = settings
        self.task = task
        self.waiting: deque[Call] = deque()
        self.workers: dict[int, WorkerProcess] = {}  # by process id
        self.failed_starts = 0
        self.is_ready = False
        self.is_unloadable = False
        self.selector = selectors.DefaultSelector()
        self.deaths = _deaths()
        for item in (pool, self.deaths):
            (item.socket if isinstance(item, Channel) else item).setblocking(False)
            self.selector.register(item, selectors.EVENT_READ)
        self._add_worker()

    def turn(self) -> None:
        """Wait for the next event or deadline and do all that it allows."""
        self._expect_room()
        moments = [worker.deadline(self.settings.timeout_s) for worker in self.workers.values()]
        nearest = min((moment for moment in moments if moment is not None), default=None)
        wait = None if nearest is None else max(nearest - time.monotonic(), 0.0)
        for key, _ in self.selector.select(wait):
            source = key.fileobj
            if source is self.deaths:
                self._reap()
            elif source is self.pool:
                self.pool.flush()
                for calls in self.pool.receive():
                    self.waiting.extend(calls)
            else:
                for worker in list(self.workers.values()):
                    if worker.channel is source:
                        worker.write()
                        self._read(worker)
        for worker in list(self.workers.values()):
            self._end_if_late(worker)
        self._hand_out()

    def stop(self) -> None:
        """Kill every worker and whatever it started, and wait until they are gone."""
        for worker in self.workers.values():
            worker.kill()
        limit = time.monotonic() + STOP_SECONDS
        with suppress(ChildProcessError):
            while time.monotonic() < limit:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    time.sleep(0.005)

    def _expect_room(self) -> None:
        """Listen for room in a socket only while something waits for it."""
        for channel in (self.pool, *(worker.channel for worker in self.workers.values())):
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.has_unsent else 0)
            if self.selector.get_key(channel).events != events:
                self.selector.modify(channel, events)

    def _read(self, worker: WorkerProcess) -> None:
        """Pass on what a worker says."""
        for message in worker.read():
            if isinstance(message, Ready):
                if not self.is_ready:
                    self.is_ready = True
                    self.pool.send(message)
            elif isinstance(message, Unloadable):
                self._give_up(message.failure)
            else:
                self.failed_starts = 0
                self.pool.send(message)
        if worker.has_hung_up:
            self._end(worker, "crash", worker.current)

    def _reap(self) -> None:
        """Find out which workers are no more."""
        with suppress(BlockingIOError):
            while self.deaths.recv(4096):
                pass
        with suppress(ChildProcessError):
            while True:
                pid, _ = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid in self.workers:
                    self._read(self.workers[pid])
                if pid in self.workers:  # something it left behind holds its socket open
                    self._end(self.workers[pid], "crash", self.workers[pid].current)

    def _end_if_late(self, worker: WorkerProcess) -> None:
        deadline = worker.deadline(self.settings.timeout_s)
        if deadline is None or time.monotonic() < deadline:
            return
        current = worker.current
        self._read(worker)  # it may have answered at the last moment
        is_there = worker.pid in self.workers
        if is_there and worker.deadline(self.settings.timeout_s) == deadline:
            self._end(worker, "timeout", current)

    def _end(self, worker: WorkerProcess, cause: str, current: int) -> None:
        """Kill a worker; its current call is to blame, the others of its batch begin anew."""
        worker.kill()
        del self.workers[worker.pid]
        self.selector.unregister(worker.channel)
        worker.channel.close()
        if worker.is_loading:
            self._count_failed_start(is_late=cause == "timeout")
            return
        if current == NOT_BEGUN and not worker.is_idle:
            self._count_failed_start(is_late=False)
        again, guilty = lost(worker.calls, worker.num_answered, current)
        if guilty:
            self.pool.send([Answer(guilty, (None,), ended=cause)])
        self.waiting.extendleft(reversed(again))

    def _count_failed_start(self, *, is_late: bool) -> None:
        """A worker ended before it made a call: try another, but not for ever."""
        self.failed_starts += 1
        if not is_late and self.failed_starts < LOAD_ATTEMPTS:
            self._add_worker()
            return
        how = f"took over {self.settings.load_seconds:g} s" if is_late else "ended the process"
        error = InputError(
            f"loading the rewards {', '.join(self.settings.specs)} {how}; keep what their files do "
            "on import short and safe"
        )
        self._give_up(failure_of(error))

    def _give_up(self, failure: Failure) -> None:
        self.is_unloadable = True
        self.pool.send(Unloadable(failure))

    def _hand_out(self) -> None:
        """Calls to idle workers, and one more worker where all are busy."""
        for worker in self.workers.values():
            if self.waiting and worker.is_idle:
                worker.give(self._share())
        is_loading = any(worker.is_loading for worker in self.workers.values())
        has_room = len(self.workers) < self.settings.num_workers
        if self.waiting and has_room and not is_loading and not self.is_unloadable:
            self._add_worker()

    def _share(self) -> list[Call]:
        """The next calls, so many that they keep one worker about as busy as the others."""
        num_waiting = sum(call.num_calls for call in self.waiting)
        room = min(-(-num_waiting // (2 * self.settings.num_workers)), BATCH)
        share = []
        while room > 0 and self.waiting:
            call = self.waiting.popleft()
            if call.num_calls > room:
                self.waiting.appendleft(call.rows(room))
                call = call.rows(0, room)
            share.append(call)
            room -= call.num_calls
        return share

    def _add_worker(self) -> None:
        others: list[Closable] = [self.pool, self.deaths, self.selector]
        others += [worker.channel for worker in self.workers.values()]
        worker = start_worker(self.settings, self.task, others)
        self.workers[worker.pid] = worker
        self.selector.register(worker.channel, selectors.EVENT_READ)


def _deaths() -> socket.socket:
    """A socket that has something to read whenever a child has died.

    The end of a worker's own socket would not do: a process it left behind may hold it open.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    return ours
