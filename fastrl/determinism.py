"""The same bits on every run, on any device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""Without it torch warns that products on a GPU may differ; it is what an H100 has anyway."""


@contextmanager
def deterministic() -> Iterator[None]:
    """Some operations have a faster variant whose sums depend on timing: not in a run."""
    name, value = CUBLAS_WORKSPACE
    configured = os.environ.get(name)
    os.environ.setdefault(name, value)
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # nothing reads what it has not set
    try:
        yield
    finally:
        if configured is None:
            os.environ.pop(name, None)
        torch.use_deterministic_algorithms(before, warn_only=warned)
        memory.fill_uninitialized_memory = filled
