"""Keeping a process within `memory_limit`: what goes beyond it fails where a run can help itself.

On a GPU torch's allocator refuses; what it does not count, such as the CUDA context, is taken off
the limit first. On a CPU Linux refuses to map more (RLIMIT_DATA): all writable memory of the
process counts, whoever asks for it, torch, numpy or Python, and what it has of files. Processes
that were started before have no limit, nor have those that Python forks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.memory.cards import memory_of
from fastrl.memory.plan import GIB
from fastrl.memory.recovery import free_memory
from fastrl.policy import resolve_device
from fastrl.process_memory import IS_COUNTED, counted_bytes

CGROUP = Path("/sys/fs/cgroup/memory.max")
PRIMING = 1 << 20
"""Elements of a sum that all threads take part in."""


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU, or of this machine as far as the process may have it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        total = min(total, int(CGROUP.read_text(encoding="ascii")))
    return total


def check_size(limit: int, given: str, device: torch.device) -> None:
    """Raise InputError for a limit that is larger than what there is."""
    there = device_bytes(device)
    if limit > there:
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
        raise InputError(
            f"memory_limit {given!r} is {limit / GIB:.4g} GiB, but {what} has {there / GIB:.4g} "
            "GiB; lower it, or remove it"
        )
    if device.type == "cpu" and not IS_COUNTED:
        raise InputError(
            f"memory_limit on a CPU is kept by Linux, which {sys.platform} is not; remove it"
        )


def resident_bytes() -> int:
    """Memory of this process that is in use; 0 where only Linux would know."""
    return counted_bytes("VmRSS")


def limit_of(config: Config) -> MemoryLimit:
    """That of a run; InputError where it is neither a size nor a card, or more than there is."""
    device, given = resolve_device(config.model.device), config.memory_limit
    if given is None:
        return MemoryLimit(None, device)
    limit = memory_of(given)
    check_size(limit, given, device)
    return MemoryLimit(limit, device)


class MemoryLimit:
    """A limit that holds within blocks; None for none."""

    def __init__(self, limit: int | None, device: torch.device, *, outside: int = 0) -> None:
        """outside: bytes that a GPU's limit pays for beside torch's allocator."""
        self.limit = limit
        self.device = device
        self.outside = outside
        self._mapped: int | None = None
        """Bytes that the process may map on a CPU; found out when the first block begins."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block what goes beyond the limit fails."""
        if self.limit is None:
            yield
        elif self.device.type == "cuda":
            share = (self.limit - self.outside) / device_bytes(self.device)
            index = self.device.index  # None for the current one, which torch refuses as "cuda"
            torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0), index)
            try:
                yield
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, index)
        else:
            import resource

            before = resource.getrlimit(resource.RLIMIT_DATA)
            if self._mapped is None:
                self._mapped = _mappable(self.limit, self.device)
                os.register_at_fork(after_in_child=partial(_set_mapped, before))
            known = [size for size in before if size != resource.RLIM_INFINITY]
            _set_mapped((min([self._mapped, *known]), before[1]))
            try:
                yield
            finally:
                _set_mapped(before)


def _mappable(limit: int, device: torch.device) -> int:
    """What a process may map for itself to stay within a limit, with what it has of files."""
    import resource

    # A thread that finds no room for its stack ends the process: have all of torch's now.
    torch.ones(PRIMING).sum()
    free_memory(device)
    resident = resident_bytes()
    if resident >= limit:
        raise InputError(
            f"memory_limit is {limit / GIB:.4g} GiB, but {resident / GIB:.4g} GiB are in use "
            "before the first step; raise it"
        )
    # What is mapped may all become resident, but for the threads' stacks; files are beside it.
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return (
        limit
        - (resident - counted_bytes("RssAnon"))
        + max(stack, 0) * (torch.get_num_threads() - 1)
    )


def _set_mapped(limits: tuple[int, int]) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, limits)
