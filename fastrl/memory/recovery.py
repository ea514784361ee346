"""What a run does when memory runs out inside a step: smaller passes, and the same work once more.

What failed has left nothing behind: it is done again from where it began, with the same rollouts,
rewards and random numbers, so that a step is what it would have been with the smaller passes from
its beginning. They stay for the rest of the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from fastrl.activations import smallest_pass
from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.packing import PackedPass
from fastrl.types import StepMetrics

T = TypeVar("T")
MAX_FAILURES = 3
"""In a step; the last of them ends the run."""
SIGNS = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory",
    "bad_alloc", "alloc_failed", "can't start new thread",
)  # fmt: skip
"""What torch, C++, CUDA's libraries and Python say where memory is short."""


class OutOfMemory(InputError):
    """Memory has run out too often for the run to help itself."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was no memory for something."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in _said(error).lower() for sign in SIGNS)


def reason_of(error: BaseException) -> str:
    """What could not be had, in a line."""
    text = _said(error)
    _, found, rest = text.partition("DefaultCPUAllocator: ")
    return (rest if found else text).partition(" Error code")[0].strip(" .") or type(error).__name__


def _said(error: BaseException) -> str:
    """The first line: those below may quote the errors of other processes."""
    return str(error).partition("\n")[0]


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to: reference cycles, and the caches of allocators."""
    gc.collect()
    if device.type == "cuda":
        # Copies on other streams may still write to what an attempt that has failed let go of.
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


class Recovery:
    """Holds how large passes are, and counts what failed; shared by all that takes memory."""

    def __init__(
        self, max_tokens_per_pass: int, smallest: int, device: torch.device, *,
        kv_cache_gib: float | None = None,
    ) -> None:  # fmt: skip
        """smallest: tokens of a pass below which no halving goes; kv_cache_gib: as configured."""
        self.configured = {"max_tokens_per_pass": max_tokens_per_pass, "kv_cache_gib": kv_cache_gib}
        self.max_tokens_per_pass = max_tokens_per_pass
        self.kv_cache_gib = kv_cache_gib
        self.smallest = smallest
        self.device = device
        self.largest_pass = 0.0
        """Tokens of the largest pass of the step, in the measure of max_tokens_per_pass."""
        self.num_failures = 0
        """In this step."""
        self.notes: list[str] = []
        """What the user has not been told yet."""
        self.forget: Callable[[], None] = _nothing
        """Drops what was begun outside of this process for an attempt that has failed."""

    def begin(self) -> None:
        """A step begins."""
        self.num_failures, self.largest_pass = 0, 0.0

    def see(self, passes: Sequence[PackedPass], row_cost: float) -> None:
        """These are what the step is about to run; row_cost: as in `smallest_pass`."""
        sizes = [len(x.plan.input_ids) + row_cost * len(x.plan.target_ids) for x in passes]
        self.largest_pass = max([self.largest_pass, *sizes])

    def redone(
        self, attempt: Callable[[], T], *, can_redo: Callable[[], bool],
        undo: Callable[[], None] = lambda: None,
    ) -> T:  # fmt: skip
        """What `attempt` returns, tried again with smaller passes wherever memory runs out.

        can_redo: whether the attempt that has failed changed nothing that `undo` does not put back.
        Raises OutOfMemory at the third failure of a step.
        """
        while True:
            try:
                return attempt()
            except Exception as error:
                if not is_out_of_memory(error) or not can_redo():
                    raise
                reason = reason_of(error)
            # Out here the exception is gone, and with it the frames that hold what it had.
            undo()
            self.failed(reason)
            self._halve_passes()

    def failed(self, reason: str) -> None:
        """Count a failure and free its memory; raises OutOfMemory if it is one too many."""
        self.forget()
        free_memory(self.device)
        self.num_failures += 1
        if self.num_failures == MAX_FAILURES:
            raise OutOfMemory(f"memory ran out {MAX_FAILURES} times in a step ({reason})")
        self.notes.append(f"out of memory: {reason}")

    def _halve_passes(self) -> None:
        """Of what the step needed at most, where that is less than what it might have."""
        before = self.max_tokens_per_pass
        used = min(before, math.ceil(self.largest_pass) or before)
        self.max_tokens_per_pass = min(before, max(used // 2, self.smallest))
        self.notes[-1] += (
            f"; passes have at most {self.max_tokens_per_pass} tokens from here on, not {before}"
        )

    def use_kv_cache(self, gib: float) -> None:
        """From here on the engine has so much for keys and values."""
        self.kv_cache_gib = gib
        self.notes[-1] += f"; keys and values have {gib:.3g} GiB from here on"

    @property
    def metrics(self) -> StepMetrics:
        """Failures of the step, and what is left of passes; of keys and values where it changed."""
        found = {
            "memory/oom": float(self.num_failures),
            "memory/max_tokens_per_pass": float(self.max_tokens_per_pass),
        }
        if self.kv_cache_gib != self.configured["kv_cache_gib"] and self.kv_cache_gib is not None:
            found["memory/kv_cache_gib"] = self.kv_cache_gib
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON; nothing where memory never ran out."""
        now = {"max_tokens_per_pass": self.max_tokens_per_pass, "kv_cache_gib": self.kv_cache_gib}
        if now == self.configured:
            return {}
        return {"configured": dict(self.configured), **now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; a size that the user has set anew is the user's."""
        for name in ("max_tokens_per_pass", "kv_cache_gib"):
            if state and state["configured"][name] == self.configured[name]:
                setattr(self, name, state[name])

    def take_notes(self) -> list[str]:
        """What is to be said now."""
        notes, self.notes = self.notes, []
        return notes


def recovery_of(config: Config, row_cost: float, device: torch.device) -> Recovery:
    """Of a run; row_cost: as in `smallest_pass`."""
    rollout = config.rollout
    smallest = smallest_pass(rollout.max_prompt_length, rollout.max_completion_length, row_cost)
    gib = rollout.engine_args.get("kv_cache_gib")
    return Recovery(config.max_tokens_per_pass, smallest, device, kv_cache_gib=gib)


def _nothing() -> None:
    """Nothing was begun."""
