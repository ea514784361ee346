"""Config from and to TOML and the command line, with one-line errors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fastrl.config import Config, ObjectiveConfig
from fastrl.errors import InputError, nearest
from fastrl.limits import Range

RUN_MARK = "# The resolved config of a FastRL run.\n"
"""First line of a run's config.toml: a directory is a run, and may be replaced, only with it."""


def load_config(path: str | Path) -> Config:
    """Read a TOML file; an unknown key, a wrong type or a bad value raises InputError."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    return _config(table, str(path))


def objective_of(config: Config) -> ObjectiveConfig:
    """The overrides of the method as one typed record; bad keys and values raise InputError."""
    return _objective(config.objective, "config")


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config; `load_config` reads the same values back."""
    import tomli_w

    path.write_text(RUN_MARK + tomli_w.dumps(_to_table(config)), encoding="utf-8")


def override_config(config: Config, arguments: Sequence[str], prog: str) -> Config:
    """Apply command-line flags such as `--rollout.num-generations 16` (tyro) to a config."""
    import tyro

    console = io.StringIO()
    try:
        if {"-h", "--help"} & set(arguments):
            tyro.cli(_Flags, prog=prog, default=_flags(config), args=["--help"])
        with contextlib.redirect_stderr(console), contextlib.redirect_stdout(console):
            overridden, unknown = tyro.cli(
                _Flags, prog=prog, default=_flags(config), args=list(arguments),
                return_unknown_args=True,
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise InputError(_first_sentence(console.getvalue())) from stop
    if unknown:
        flags = [_flag(name) for name in _field_paths(_flags(config))]
        raise InputError(f"unknown argument {unknown[0]!r}; {nearest(unknown[0], flags)}")
    return _config(_to_table(overridden), "command line")


@dataclasses.dataclass(frozen=True)
class _Flags(Config):
    """A config as the command line shows it: every key of `objective` is a flag."""

    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)  # type: ignore[assignment]


def _flags(config: Config) -> _Flags:
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return _Flags(**{**fields, "objective": objective_of(config)})


def _config(table: Mapping[str, Any], origin: str) -> Config:
    """A table as a config, its overrides of the method as they were given."""
    config: Config = _build(Config, table, origin, prefix="")
    given = _to_table(_objective(config.objective, origin))
    return dataclasses.replace(config, objective={k: v for k, v in given.items() if v != {}})


def _objective(table: Mapping[str, Any], origin: str) -> ObjectiveConfig:
    overrides: ObjectiveConfig = _build(ObjectiveConfig, table, origin, prefix="objective.")
    return overrides


def _build(cls: type, table: Mapping[str, Any], origin: str, prefix: str) -> Any:
    """A dataclass from a TOML table, recursively; ranges and literals are checked here, once."""
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise InputError(f"{origin}: unknown key {name!r}; {nearest(key, list(hints))}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise InputError(f"{origin}: {name} must be a table, got {value!r}")
            values[key] = _build(hints[key], value, origin, prefix=f"{name}.")
        else:
            values[key] = _checked(hints[key], value, f"{origin}: {name}")
    return cls(**values)


def _checked(hint: Any, value: Any, name: str) -> Any:
    """`value` as `hint` wants it, or InputError."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *marks = get_args(hint)
        value = _checked(inner, value, name)
        for mark in marks:
            if isinstance(mark, Range) and value not in mark:
                raise InputError(f"{name} must be {mark}, got {value!r}")
        return value
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        return _checked(options[0], value, name)
    if origin is Literal:
        if value not in get_args(hint):
            known = ", ".join(map(str, get_args(hint)))
            raise InputError(f"{name} must be one of {known}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} must be a list, got {value!r}")
        return tuple(_checked(get_args(hint)[0], item, f"{name} item") for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{name} must be a table, got {value!r}")
        return dict(value)
    return _scalar(hint, value, name)


def _scalar(hint: type, value: Any, name: str) -> Any:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise InputError(f"{name} must be {words[hint]}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, got {value}")
    return value


def _to_table(value: Any) -> Any:
    """Dataclasses to plain tables; None is left out, as TOML has no such value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _to_table(item) for name, item in items if item is not None}
    if isinstance(value, tuple):
        return list(value)
    return value


def as_paths(config: Config) -> dict[str, Any]:
    """Every option that is set, by its dotted name; those inside of free tables as well."""
    found: dict[str, Any] = {}

    def walk(table: Mapping[str, Any], prefix: str) -> None:
        for key, value in table.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    walk(_to_table(config), "")
    return found


def _field_paths(value: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            names += _field_paths(item, f"{prefix}{field.name}.")
        elif isinstance(item, dict):
            names += [f"{prefix}{field.name}.{key}" for key in item]
        else:
            names.append(f"{prefix}{field.name}")
    return names


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")


def _first_sentence(framed: str) -> str:
    """tyro's message (a title, a rule, the message, a rule, help) as one line."""
    paragraphs: list[list[str]] = [[]]
    for line in framed.splitlines():
        text = line.strip(" │╭╮╰╯─-")
        if text:
            paragraphs[-1].append(text)
        elif paragraphs[-1]:
            paragraphs.append([])
    message = paragraphs[1] if len(paragraphs) > 1 else paragraphs[0]
    return " ".join(message) or "the command line could not be read; see fastrl train --help"
