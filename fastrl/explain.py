"""What a field of the config is: its text, type, limits, default, and TRL's name for it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from fastrl import config as config_module
from fastrl.config import Config, ObjectiveConfig
from fastrl.errors import InputError, nearest
from fastrl.integrations.trl import SAME
from fastrl.limits import Range

OBJECTIVE = "objective"


def explain(name: str) -> list[str]:
    """Lines about a field by its dotted name, or about every field of a table, or of the config.

    name: "" for all. Raises InputError for an unknown name, with the nearest one.
    """
    path = name.removeprefix("--").replace("-", "_").strip(".")
    found = {key: text for key, text in _fields().items() if _is_asked(key, path)}
    if not found:
        hint = nearest(path, sorted(_fields()))
        raise InputError(f"the config has no field {name!r}; {hint}")
    if path in found and path != OBJECTIVE:
        return found[path]
    return [line for lines in found.values() for line in (*lines, "")][:-1]


def _is_asked(key: str, path: str) -> bool:
    return not path or key == path or key.startswith(f"{path}.")


def _fields() -> dict[str, list[str]]:
    """Dotted name -> lines, of every field; those of `objective` too."""
    found: dict[str, list[str]] = {}
    for name, (cls, field) in _walk(Config, "").items():
        found[name] = _lines(name, cls, field)
        if name == OBJECTIVE:
            for inner, (owner, item) in _walk(ObjectiveConfig, f"{OBJECTIVE}.").items():
                found[inner] = _lines(inner, owner, item)
    return found


def _walk(cls: type, prefix: str) -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    hints = get_type_hints(cls)
    found: dict[str, tuple[type, dataclasses.Field[Any]]] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= _walk(hints[field.name], f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = (cls, field)
    return found


def _lines(name: str, cls: type, field: dataclasses.Field[Any]) -> list[str]:
    hint = get_type_hints(cls, include_extras=True)[field.name]
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    lines = [f"{name} ({_type(hint)}; default {_value(default, name)})"]
    lines += [f"    {_docs(cls)[field.name]}"]
    if name in SAME:
        lines += [f"    TRL: {SAME[name]}"]
    return lines


def _type(hint: Any) -> str:
    """A type with its limits, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    words = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    if hint in words:
        return words[hint]
    if origin is Annotated:
        limits = [str(mark) for mark in arguments[1:] if isinstance(mark, Range)]
        return " ".join([_type(arguments[0]), *limits])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "table"
    return " or ".join(_type(option) for option in arguments if option is not type(None))


def _value(default: Any, name: str) -> str:
    if default is None:
        return "the method's" if name.startswith(f"{OBJECTIVE}.") else "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Mapping | tuple):
        return ", ".join(map(str, default)) if default else "empty"
    return repr(default) if isinstance(default, str) else f"{default:g}"


def _docs(cls: type) -> dict[str, str]:
    """The string under each field, on one line."""
    tree = ast.parse(inspect.getsource(config_module))
    (body,) = (x.body for x in tree.body if isinstance(x, ast.ClassDef) and x.name == cls.__name__)
    return {
        ast.unparse(item.target): " ".join(str(ast.literal_eval(text.value)).split())
        for item, text in pairwise(body)
        if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
