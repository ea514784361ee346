"""What is known and counted while a plan is attached to a model."""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field

from fastrl_kernels import Segments


@dataclass
class Block:
    """One `with plan.attach(model)`, or the recomputation of one of its layers."""

    segments: Segments | None = None
    """Those of the forward pass under way."""
    num_forwards: int = 0
    windows: list[int | None] = field(default_factory=list)
    """One a call of attention."""
    mixer_calls: Counter[str] = field(default_factory=Counter)
    """Calls of the other functions that mix tokens, by name."""


current_block: ContextVar[Block | None] = ContextVar("current_block", default=None)
