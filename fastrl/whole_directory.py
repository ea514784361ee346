"""Directories that are whole or not there: written aside, summed, synced, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

PARTIAL = ".partial-"
MANIFEST = "manifest.json"
"""Size and BLAKE2 sum of every other file of a directory."""


class renamed_when_whole:
    """A directory to fill: it appears under its name on success and vanishes on failure.

    What is there under that name is replaced. After a crash at any moment the name holds either
    what it held before, or nothing where that was just being replaced, or all that is new.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(f"{PARTIAL}{target.name}")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        text = json.dumps(_sums(self.partial), indent=1)
        (self.partial / MANIFEST).write_text(text, encoding="utf-8")
        for path in [*self.partial.rglob("*"), self.partial]:
            sync(path)
        if self.target.exists():
            shutil.rmtree(self.target)
        self.partial.rename(self.target)
        sync(self.target.parent)


def problem_of(directory: Path) -> str | None:
    """What a directory that was written here lacks since; None where it is whole."""
    try:
        expected = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    found = _sums(directory)
    for name, value in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != value[0]:
            return f"{name} has {found[name][0]} bytes, not {value[0]}"
        if found[name] != value:
            return f"{name} is not what was written"
    return None


def remove_partial(parent: Path) -> None:
    """Delete what a killed process left half-written below `parent`."""
    for path in parent.glob(f"{PARTIAL}*"):
        shutil.rmtree(path)


def _sums(directory: Path) -> dict[str, list[int | str]]:
    """Bytes and sum of every file but the manifest, by its path below the directory."""
    found: dict[str, list[int | str]] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != directory / MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()
            found[str(path.relative_to(directory))] = [path.stat().st_size, digest[:32]]
    return found


def sync(path: Path) -> None:
    """Have the file or directory on the disk, not in a cache that a power cut would empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
