"""Time and memory of one call, on a CPU or a GPU.

Time: what is compared takes turns, in an order drawn anew every round, so that a slow minute of the
machine falls on all of it.

Memory on a GPU: most bytes in tensors during the call minus the bytes before it. On a CPU: growth
of the resident set during the call, from its high-water mark, in a process of its own, in which an
earlier call has loaded libraries and started threads. Blocks of a mebibyte and more bypass the
heap, so that holes in it do not count.
"""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastrl.process_memory import IS_COUNTED, counted_bytes, forget_peak

Step = Callable[[], object]

MAX_ROUNDS = 30
M_MMAP_THRESHOLD = -3  # from malloc.h


class Timing(NamedTuple):
    """Milliseconds of one call."""

    p20: float
    p50: float
    p80: float


def quantiles(milliseconds: Sequence[float]) -> Timing:
    """p20, p50 and p80 of several calls."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Timing(*torch.tensor(milliseconds, dtype=torch.float64).quantile(levels).tolist())


def time_one(step: Step, device: torch.device) -> float:
    """Wall milliseconds of one call, until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def time_in_turns(
    turns: dict[str, Callable[[], float]], *, deadline: float, seed: int = 0
) -> dict[str, list[float]]:
    """What every turn returns, its milliseconds, call by call.

    Rounds of all of them, at least one and at most 30, as long as another is likely to end before
    `deadline`, in seconds of `time.perf_counter`. Each should have run before.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    order, shuffle = list(turns), random.Random(seed).shuffle
    for _ in range(MAX_ROUNDS):
        began = time.perf_counter()
        shuffle(order)
        for name in order:
            times[name].append(turns[name]())
        ended = time.perf_counter()
        if ended + (ended - began) > deadline:
            break
    return times


def peak_on_cuda(step: Step, device: torch.device) -> int:
    """Most bytes in tensors during a call beyond those before it; the call has run before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_on_cpu(step: Step) -> int:
    """Growth of the resident set in bytes; for a fresh process, as above."""
    before = reset_high_water_mark()
    step()
    return high_water_mark() - before


def count_big_blocks() -> None:
    """Let blocks of a mebibyte and more bypass the heap from here on."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**20)


def reset_high_water_mark() -> int:
    """Set the mark back to what is resident, in bytes, after all that is unused was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    return high_water_mark()


def high_water_mark() -> int:
    """Most bytes that were resident since the mark was set back."""
    if not IS_COUNTED:
        raise RuntimeError("memory on a CPU is measured on Linux, which this is not")
    return counted_bytes("VmHWM")


def available_bytes(device: torch.device) -> int:
    """Memory that is free now; of a CPU under Linux, within the limit of its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        found.append(int(text) - int(used.read_text(encoding="ascii")))
    return min(found)
