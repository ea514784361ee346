"""Memory that runs out where a test wants it to."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
)


class Shortage(TorchDispatchMode):
    """Within the mode, operation number `at` of watched code finds no memory, so many times.

    at: from 1, counted within one call of what is watched. after: calls that go well before.
    """

    def __init__(self, *, at: int = 1, times: int = 1, after: int = 0) -> None:
        super().__init__()
        self.at, self.times, self.after = at, times, after
        self.depth = self.num_calls = self.num_operations = self.num_failures = 0

    def watch(self, monkeypatch: Any, owner: Any, name: str) -> Shortage:
        """Count the operations of a function or method from here on."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **options: Any) -> Any:
            if _get_current_dispatch_mode() is not self:  # a plan runs the same code without data
                return original(*args, **options)
            if self.depth == 0:
                self.num_calls += 1
                self.num_operations = 0
            self.depth += 1
            try:
                return original(*args, **options)
            finally:
                self.depth -= 1

        monkeypatch.setattr(owner, name, watched)
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or fail."""
        if self.depth and self.num_calls > self.after and self.num_failures < self.times:
            self.num_operations += 1
            if self.num_operations == self.at:
                self.num_failures += 1
                raise RuntimeError(MESSAGE)
        return func(*args, **(kwargs or {}))


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Weights, moments and value model of a trainer, by name."""
    found = {f"weights.{k}": v for k, v in trainer.policy.model.state_dict().items()}
    pending: list[tuple[str, Any]] = [("learner", trainer.learner.state_dict())]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(f"{name}.{key}", item) for key, item in enumerate(value)]
        elif isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, int | float):
            found[name] = torch.tensor(float(value), dtype=torch.float64)
    return found
