"""Words of a command line that are taken out of it one by one."""

from __future__ import annotations

from pathlib import Path

from fastrl.errors import InputError


def take_path(words: list[str], name: str) -> Path | None:
    """The path behind `name`, if it is there."""
    value = take_value(words, name)
    return None if value is None else Path(value)


def take_json_path(words: list[str]) -> str | None:
    """The file that --json names, which can be written."""
    path = take_value(words, "--json")
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise InputError(f"--json {path}: expected a file in an existing directory")
    return path


def take_values(words: list[str], name: str) -> list[str]:
    """All words behind `name`, which may be there several times."""
    found = []
    while (value := take_value(words, name)) is not None:
        found.append(value)
    return found


def take_switch(words: list[str], name: str) -> bool:
    """Whether the word is there."""
    found = name in words
    if found:
        words.remove(name)
    return found


def take_value(words: list[str], name: str) -> str | None:
    """The word behind `name`, as NAME VALUE or NAME=VALUE."""
    for index, word in enumerate(words):
        if word.startswith(f"{name}="):
            words[index : index + 1] = word.split("=", 1)
    if name not in words:
        return None
    index = words.index(name)
    if index + 1 >= len(words) or words[index + 1].startswith("-"):
        raise InputError(f"{name} needs a value")
    value = words[index + 1]
    del words[index : index + 2]
    return value


def no_more(words: list[str]) -> None:
    """Raise InputError for words that nobody has taken."""
    if words:
        raise InputError(f"unexpected argument {words[0]!r}; see fastrl --help")
