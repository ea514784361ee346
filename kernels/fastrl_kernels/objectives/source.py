"""Objectives are functions: where one is found again, what it takes, and its torch binding."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


@torch.compiler.assume_constant_result
def name_of(function: Function) -> str:
    """Where an objective's function can be imported from: "module:name", for operators."""
    source = source_of(function)
    return f"{source.__module__}:{source.__qualname__}"


def function_of(name: str) -> Function:
    """The function that `name_of` named."""
    module_name, _, qualified_name = name.partition(":")
    module = sys.modules.get(module_name)
    function = getattr(module, qualified_name, None)
    if function is None:
        raise ValueError(
            f"an objective must be a function of a module's top level, got {name}; move it there, "
            "so that a kernel can be made of its source"
        )
    found: Function = source_of(function)
    return found


def source_of(function: Function) -> Any:
    """The plain function; one that went through triton.jit keeps it in `.fn`."""
    return getattr(function, "fn", function)


@torch.compiler.assume_constant_result
def arguments_of(function: Function) -> tuple[str, ...] | None:
    """Names of the arguments of a function that can be found again by its own; else None."""
    source = source_of(function)
    if not isinstance(source, types.FunctionType):
        return None
    found = getattr(sys.modules.get(source.__module__), source.__qualname__, None)
    if found is None or source_of(found) is not source:
        return None
    return source.__code__.co_varnames[: source.__code__.co_argcount]


@functools.cache
def bind_torch(function: Function) -> Function:
    """The same source with `tl` bound to torch, for tensors of any dtype on any device.

    Functions that it calls and that were made for kernels are bound alike.
    """
    source = source_of(function)
    namespace = {**source.__globals__, "tl": torch}
    for name in source.__code__.co_names:
        called = source.__globals__.get(name)
        if hasattr(called, "fn") or isinstance(called, types.FunctionType):
            namespace[name] = bind_torch(called)
    return types.FunctionType(source.__code__, namespace, source.__name__, source.__defaults__)
