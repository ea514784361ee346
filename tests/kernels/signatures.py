"""Whether a module takes another library's arguments, by name and by place."""

import inspect
from collections.abc import Callable
from typing import Any


def positional(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Names and defaults of the arguments that may be given without a name."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return [(item.name, item.default) for item in parameters if item.kind in kinds]


def check_signatures(ours: type, theirs: type) -> None:
    """Assert that constructor and forward are called alike, with the same defaults."""
    for name in ("__init__", "forward"):
        assert positional(getattr(ours, name)) == positional(getattr(theirs, name)), name
