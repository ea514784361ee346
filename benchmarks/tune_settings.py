"""Other launch settings for a while, wherever in the kernels' modules they are."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Settings = Mapping[str, Any]
"""Values by "module:NAME", or by "module:NAME.key.field" for a field of an entry of a table."""
WITH_KERNELS = (
    "decode_attention", "linear_logps", "policy_loss", "segment_attention", "select_tokens",
    "selected_logps", "token_loss",
)  # fmt: skip


@contextmanager
def overridden(settings: Settings) -> Iterator[None]:
    """Launch settings have other values within.

    Keys are "module:NAME", or "module:NAME.key.field" for a field of a named tuple that is an entry
    of a dictionary. Settings are read at every launch, so nothing else has to be told.
    """
    saved = []
    try:
        for path, value in settings.items():
            module, names = place(path)
            saved.append((module, names[0], getattr(module, names[0])))
            setattr(module, names[0], replaced(saved[-1][2], names[1:], value))
        yield
    finally:
        for module, name, value in reversed(saved):
            setattr(module, name, value)


def place(path: str) -> tuple[Any, list[str]]:
    """The module, and the names from its attribute on."""
    module, names = path.split(":")
    return importlib.import_module(module), names.split(".")


def current(path: str) -> Any:
    """The value that is used today."""
    module, names = place(path)
    value = getattr(module, names[0])
    for name in names[1:]:
        value = value[key_of(value, name)] if isinstance(value, dict) else getattr(value, name)
    return value


def replaced(value: Any, names: Sequence[str], new: Any) -> Any:
    """A copy in which what the names lead to is `new`."""
    if not names:
        return new
    name, *rest = names
    if isinstance(value, dict):
        key = key_of(value, name)
        return {**value, key: replaced(value[key], rest, new)}
    return value._replace(**{name: replaced(getattr(value, name), rest, new)})


def key_of(table: dict[Any, Any], name: str) -> Any:
    """Keys of tables are texts or numbers; a new one would change nothing."""
    key = next((key for key in table if str(key) == name), None)
    if key is None:
        raise KeyError(f"expected one of {list(table)}, got {name!r}")
    return key


@contextmanager
def interpreted() -> Iterator[None]:
    """The library's functions run their kernels on a CPU too, in Triton's interpreter."""
    import fastrl_kernels

    saved = {name: getattr(fastrl_kernels, name) for name in WITH_KERNELS}
    try:
        for name, function in saved.items():
            setattr(fastrl_kernels, name, functools.partial(by_kernels, function))
        yield
    finally:
        for name, function in saved.items():
            setattr(fastrl_kernels, name, function)


def by_kernels(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Whatever implementation was asked for; in float64, which the truth is in, there are none."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if any(x.dtype == torch.float64 for x in tensors):
        return function(*args, **kwargs)
    return function(*args, **{**kwargs, "implementation": "triton"})
