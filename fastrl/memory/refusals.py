"""Which layer of a model a failure comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from fastrl.errors import InputError
from fastrl.integrations.capabilities import without_wrappers


@contextmanager
def layer_named(model: Any) -> Iterator[None]:
    """Within the block a model that does not run without data is refused, naming its layer."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever an operation without a form for "meta" happens to raise
        inner: Any = without_wrappers(model)
        path, layer = _innermost(inner, error.__traceback__)
        reason = " ".join(str(error).split())[:200]
        where = f"{type(layer).__name__} at {path}" if path else type(inner).__name__
        raise InputError(
            f"the memory of {type(inner).__name__} cannot be planned: {where} does not run "
            f"without data ({type(error).__name__}: {reason})"
        ) from error


def _innermost(model: nn.Module, traceback: TracebackType | None) -> tuple[str, nn.Module]:
    """The module of the model that ran when the error came."""
    paths = {module: path for path, module in model.named_modules()}
    found: nn.Module = model
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in paths:
            found = module
        traceback = traceback.tb_next
    return paths[found], found
