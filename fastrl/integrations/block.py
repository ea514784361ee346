"""What is known and counted while a plan is attached to a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor, nn

from fastrl_kernels import Segments

KeepKeyValues = Callable[[nn.Module, Tensor, Tensor], None]
"""Given an attention layer with its keys and values (1, Hkv, N, K) of a packed row."""


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
    keep: KeepKeyValues | None = None
    """Where keys and values go beside attention, for whoever continues the row later."""


current_block: ContextVar[Block | None] = ContextVar("current_block", default=None)
