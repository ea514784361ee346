"""Seconds and memory of the phases of a step: values, rollout, score, train."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping

import torch

from fastrl.process_memory import IS_COUNTED, counted_bytes, forget_peak
from fastrl.types import StepMetrics

GIB = 2**30


class PeakMemory:
    """Most memory so far, and since a phase began: allocated on a GPU, resident on a CPU.

    It sets the process's own high-water mark back; outside of Linux a CPU has but one mark, which
    nobody can set back, and phases have none of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.has_phases = device.type == "cuda" or IS_COUNTED
        self.planned: Mapping[str, int] = {}
        """Bytes that phases are expected to take, by their names."""
        self.planned_highest: int | None = None
        """Of all phases of the plan, those too that no clock looks at."""
        self._highest = 0

    @property
    def highest(self) -> int:
        """Bytes, of all phases so far and of the one that is under way."""
        return max(self._highest, self._mark())

    def end_phase(self) -> int:
        """Bytes since the last phase ended; the next one begins."""
        mark = self._mark()
        self._highest = max(self._highest, mark)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.has_phases:
            forget_peak()
        return mark

    def restart(self) -> None:
        """Forget what was highest."""
        self.end_phase()
        self._highest = 0

    def _mark(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.has_phases:
            return counted_bytes("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PhaseClock:
    """One step's time and memory, phase by phase; a phase may come several times."""

    def __init__(self, memory: PeakMemory | None = None) -> None:
        self.memory = memory or PeakMemory(torch.device("cpu"))
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.memory.end_phase()  # what comes between two steps belongs to none

    def lap(self, name: str) -> None:
        """What was since the last lap belongs to `name`, beside what it had before."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.peaks[name] = max(self.peaks.get(name, 0), self.memory.end_phase())
        self.last = now

    @property
    def metrics(self) -> StepMetrics:
        """Under the names of the logs."""
        found = {
            "step_time": self.last - self.started,
            **{f"time/{name}": seconds for name, seconds in self.laps.items()},
            "memory/peak_gib": self.memory.highest / GIB,
        }
        if self.memory.has_phases:
            found |= {f"memory/{name}_gib": peak / GIB for name, peak in self.peaks.items()}
            planned = self.memory.planned
            found |= {
                f"memory/{name}_plan_gib": planned[name] / GIB
                for name in self.peaks
                if name in planned
            }
        return found
