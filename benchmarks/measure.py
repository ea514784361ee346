"""Time and memory of one call, on CPU or CUDA.

Time: implementations take turns, in an order drawn anew every round, so that a slow minute of the
machine falls on all of them. CUDA is timed with events after the L2 cache has been overwritten, the
CPU with the wall clock.

Memory on CUDA: most bytes in tensors during the call minus the bytes before it.

Memory on CPU: growth of the resident set during the call, from its high-water mark (VmHWM, what
`getrusage` calls ru_maxrss), in a process of its own. Before it the inputs are resident, one
earlier call has loaded libraries, started threads and compiled what gets compiled, its results are
freed and the heap is trimmed; then the mark is set back to what is resident. So it is what the call
needs beyond its inputs: outputs, gradients, saved tensors and buffers, in pages really touched.
ru_maxrss itself cannot be set back, and starts at the size of the parent process. Blocks of a
mebibyte and more bypass the heap, so that holes in it, which differ from run to run, do not count.
Beside it stands the tracker's count: most bytes that torch's own allocator had handed out and not
got back during a call, which no page size blurs, and which sees no library's own buffers.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from fastrl.bench.measuring import (
    Timing,
    count_big_blocks,
    high_water_mark,
    quantiles,
    reset_high_water_mark,
)

Step = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 5, 30
COPIED_BYTES = {"cpu": 2**26, "cuda": 2**30}  # well beyond the caches
GRACE_SECONDS = 10.0  # for a process to end after its answer


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError within the block as soon as Python runs again after so many seconds.

    Limits may be nested; an inner one that is longer than what is left of the outer one ends with
    it. Main thread only.
    """
    if seconds is None:
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.3g} s")

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    before = signal.getitimer(signal.ITIMER_REAL)[0]
    signal.setitimer(signal.ITIMER_REAL, min(seconds, before or seconds))
    try:
        yield
    finally:
        left = max(before - (time.monotonic() - started), 1e-3) if before else 0.0
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left)


class ProcessLost(Exception):
    """A process ended without an answer; the message says how."""


class Peaks(NamedTuple):
    """Bytes of one call beyond its inputs."""

    resident: int
    tracked: int
    """What torch's allocator had handed out."""


def time_interleaved(
    steps: dict[str, Step], *, device: str, seconds: float, seed: int = 0,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, Timing]:  # fmt: skip
    """Quantiles of every step; `seconds` bounds the rounds, of which there are 5 to 30.

    min_rounds: fewer than 5, for steps of many seconds.
    """
    time_one = _cuda_timer() if device == "cuda" else time_on_cpu
    warm_up = sum(time_one(step) for step in steps.values())
    num_rounds = min(MAX_ROUNDS, max(min_rounds, int(1000 * seconds / warm_up)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(seed).shuffle
    for _ in range(num_rounds):
        shuffle(order)
        for name in order:
            times[name].append(time_one(steps[name]))
    return {name: quantiles(values) for name, values in times.items()}


def time_on_cpu(step: Step) -> float:
    """Wall milliseconds of one call."""
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def _cuda_timer() -> Callable[[Step], float]:
    """Device milliseconds of one call with a cold L2 cache."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(4 * cache_bytes, dtype=torch.int8, device="cuda")

    def time_one(step: Step) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return time_one


def peak_on_cuda(step: Step, release: Step) -> int:
    """Most bytes in tensors during a call beyond those before it; `release` frees its gradients."""
    step()
    release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_step(device: str) -> Step:
    """Copies COPIED_BYTES of memory once: as many bytes are read as written."""
    source = torch.ones(COPIED_BYTES[device], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(device: str, timing: Timing) -> float:
    """GB/s of a copy step, reads and writes together."""
    return 2 * COPIED_BYTES[device] / timing.p50 / 1e6


def peak_on_cpu(step: Step, release: Step) -> int:
    """Growth of the resident set in bytes; call it in a fresh process (see above)."""
    count_big_blocks()
    step()
    release()
    before = reset_high_water_mark()
    step()
    return high_water_mark() - before


def peaks_on_cpu(step: Step, release: Step) -> Peaks:
    """Both counts of a call; call it in a fresh process (see above)."""
    resident = peak_on_cpu(step, release)
    release()
    return Peaks(resident, tracked_peak(step))


def tracked_peak(step: Step) -> int:
    """Most bytes that torch's CPU allocator handed out in a call and had not got back yet.

    The profiler hears of every block, inside operations and compiled code too. What is freed of
    earlier blocks does not count.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start and stop otherwise
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profile:
        step()
    events = [x for x in profile.kineto_results.events() if x.name() == "[memory]"]
    in_use = highest = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        in_use += event.nbytes()
        highest = max(highest, in_use)
    return highest


def in_fresh_process(
    function: Callable[..., Any], *args: Any, limit_seconds: float | None = None
) -> Any:
    """The function's result from a process in which nothing has run; all must be picklable.

    Raises what the function raises, and ProcessLost where the process ends without an answer, or
    has none after `limit_seconds`: then it is killed, with all processes it started.
    """
    # Forked from one that has only imported torch, which would take most of a new one's time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    receiver, sender = context.Pipe(duplex=False)
    is_outermost = multiprocessing.parent_process() is None
    process = context.Process(target=_answer, args=(sender, is_outermost, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_seconds):
            raise ProcessLost(f"killed after {limit_seconds:.0f} s")
        succeeded, answer = receiver.recv()
        process.join(GRACE_SECONDS)
    except EOFError:
        process.join(GRACE_SECONDS)
        raise ProcessLost(f"its process ended with status {process.exitcode}") from None
    finally:
        _kill(process, with_group=is_outermost)
    if succeeded:
        return answer
    raise answer


def _answer(
    sender: Connection, is_outermost: bool, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Sends what the function returned, or what it raised."""
    if is_outermost:  # what it starts can then be killed with it
        os.setpgid(0, 0)
    try:
        answer = (True, function(*args))
    except Exception as error:  # the parent raises it
        error.add_note(traceback.format_exc())
        answer = (False, error)
    sender.send(answer)


def _kill(process: BaseProcess, *, with_group: bool) -> None:
    """End a process, and what is left of those that it started."""
    if with_group and process.pid is not None:
        with suppress(ProcessLookupError, PermissionError):  # none left, or not yet a group
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
