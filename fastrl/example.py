"""A record of a task, apart from all that needs torch: processes that score do without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""One chat turn: {"role": ..., "content": ...}."""


@dataclass(frozen=True)
class Example:
    """One record of a task: a prompt, its reference answer if any, and other columns."""

    prompt: str | list[Message]
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    later_turns: tuple[str, ...] = ()
    """User messages still to come, each once the one before it has been answered."""
