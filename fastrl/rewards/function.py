"""Reward functions written by users, in TRL's signature f(prompts, completions, **columns)."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrl.errors import InputError, nearest
from fastrl.example import Example
from fastrl.tasks.prompt import prompt_start

RewardFunction = Callable[
    [Sequence[Example], Sequence[str], Sequence[list[int]]], list[float | None]
]
"""(examples, texts, completion_ids), one of each per completion -> one score each, or None."""


def function_reward(spec: str) -> RewardFunction:
    """The function named by "MODULE:FUNCTION" or "path/to/file.py:FUNCTION", with its checks.

    It receives, by name and only where its signature has the name: `prompts` and `completions`
    (text, or chat messages where the prompt is a chat), `completion_ids`, `answer` and every column
    of the examples, as lists with one entry per completion.
    """
    return checked_function(load_function(spec), spec)


def checked_function(function: Callable[..., Any], spec: str) -> RewardFunction:
    """A user's function as a reward, which checks what it asks for and what it returns."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the reward {spec!r} must be a Python function f(prompts, completions, **columns), "
            f"got {function!r}"
        ) from error

    def score(
        examples: Sequence[Example], texts: Sequence[str], completion_ids: Sequence[list[int]]
    ) -> list[float | None]:
        columns = reward_columns(examples, texts, completion_ids)
        arguments = _accepted(parameters, columns, spec)
        try:
            output = function(**arguments)
        except Exception as error:
            raise InputError(
                f"the reward {spec!r} raised {type(error).__name__}: {_one_line(error)}, in a "
                f"batch that begins with the prompt {prompt_start(examples[0].prompt)}"
            ) from error
        return _checked_scores(output, examples, spec)

    return score


def load_function(spec: str) -> Callable[..., Any]:
    """The callable that "MODULE:FUNCTION" or "path/to/file.py:FUNCTION" names."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise InputError(f"expected MODULE:FUNCTION or path/to/file.py:FUNCTION, got {spec!r}")
    module = _import(source, spec)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value)]
        hint = nearest(name, known) if known else "the module defines no function"
        raise InputError(f"{module.__file__ or source} has no function {name!r}; {hint}")
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"the reward {spec!r} must be a function, got {type(function).__name__}")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  the method itself is inspected
    ):
        raise InputError(f"the reward {spec!r} is async, which is unsupported; write a plain def")
    return function


def reward_columns(
    examples: Sequence[Example], texts: Sequence[str], completion_ids: Sequence[list[int]]
) -> dict[str, list[Any]]:
    """Every argument a reward function can ask for, each a list with one entry per completion.

    A column that only some of the examples have is None in the others.
    """
    names = {name: None for example in examples for name in example.columns}
    return {
        **{name: [example.columns.get(name) for example in examples] for name in names},
        "answer": [example.answer for example in examples],
        "prompts": [example.prompt for example in examples],
        "completions": [
            text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]
            for example, text in zip(examples, texts, strict=True)
        ],
        "completion_ids": list(completion_ids),
    }


def _import(source: str, spec: str) -> ModuleType:
    """The module of a file path or of a dotted name, with the current directory importable."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if source.endswith(".py"):
            return _import_file(Path(source), spec)
        return importlib.import_module(source)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name is not None and f"{source}.".startswith(f"{error.name}.")
        hint = (
            f"there is no module {error.name!r} here or installed"
            if missing
            else f"importing {source} failed: {_one_line(error)}"
        )
        raise InputError(
            f"cannot load the reward {spec!r}: {hint}; give MODULE:FUNCTION or "
            "path/to/file.py:FUNCTION"
        ) from error
    except Exception as error:
        raise InputError(
            f"cannot load the reward {spec!r}: importing {source} raised {type(error).__name__}: "
            f"{_one_line(error)}"
        ) from error


def _import_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise InputError(
            f"cannot load the reward {spec!r}: there is no file {path}; paths are relative to the "
            "current directory"
        )
    name = str(path.resolve())  # two files may share a stem
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    module_spec.loader.exec_module(module)
    return module


def _accepted(parameters: Any, columns: dict[str, list[Any]], spec: str) -> dict[str, list[Any]]:
    """The columns that the function's signature has room for."""
    kinds = inspect.Parameter
    for name, parameter in parameters.items():
        if parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            continue
        if parameter.kind is kinds.POSITIONAL_ONLY:
            raise InputError(
                f"the reward {spec!r} takes {name!r} by position only, and arguments are passed by "
                "name; remove the '/' from its signature"
            )
        if parameter.default is kinds.empty and name not in columns:
            raise InputError(
                f"the reward {spec!r} needs {name!r}, which no column provides; "
                f"known: {', '.join(sorted(columns))}"
            )
    if any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters.values()):
        return columns
    return {name: values for name, values in columns.items() if name in parameters}


def _checked_scores(output: Any, examples: Sequence[Example], spec: str) -> list[float | None]:
    """The returned scores as floats, after checking their number and each of them."""
    # Arrays and tensors have `tolist`; torch itself is not imported where only rewards run.
    values = output.tolist() if hasattr(output, "tolist") else output
    if not isinstance(values, list | tuple):
        raise InputError(
            f"the reward {spec!r} must return a list with one number or None per completion, got "
            f"{type(output).__name__} for the prompt {prompt_start(examples[0].prompt)}"
        )
    if len(values) != len(examples):
        raise InputError(
            f"the reward {spec!r} must return one score per completion, {len(examples)}, got "
            f"{len(values)} in a batch that begins with the prompt "
            f"{prompt_start(examples[0].prompt)}"
        )
    for value, example in zip(values, examples, strict=True):
        if value is not None and not isinstance(value, Real):
            raise InputError(
                f"the reward {spec!r} must return finite numbers or None, got {_short(value)} for "
                f"the prompt {prompt_start(example.prompt)}"
            )
    return [None if value is None else _as_float(value) for value in values]


def _as_float(value: Any) -> float:
    """Also one that is not finite, which costs the step and not the run."""
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return math.copysign(math.inf, value)


def _short(value: Any) -> str:
    return " ".join(repr(value).split())[:40]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no message"
