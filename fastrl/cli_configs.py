"""The config that the words of a command line name, with the flags behind it applied."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.errors import InputError

if TYPE_CHECKING:
    from fastrl.config import Config


def config_of(words: list[str], prog: str) -> Config:
    """The config file named first, with the flags behind it applied."""
    from fastrl.config import Config
    from fastrl.config_io import load_config, override_config

    if {"-h", "--help"} & set(words):
        return override_config(Config(), ["--help"], prog)  # prints and exits
    if not words or words[0].startswith("-"):
        raise InputError(f"give a config file first: {prog}")
    return override_config(load_config(words[0]), words[1:], prog)


def run_or_config(words: list[str], prog: str) -> tuple[Config, Path | None]:
    """The config of the run or file named first, with its flags, and the run if it is one."""
    if not words or words[0].startswith("-"):
        raise InputError(f"give a run directory or a config: {prog}")
    run_directory = Path(words[0]) if Path(words[0]).is_dir() else None
    if run_directory is not None:
        if not (run_directory / "config.toml").is_file():
            raise InputError(f"{run_directory} is not a run: it has no config.toml")
        words = [str(run_directory / "config.toml"), *words[1:]]
    return config_of(words, prog), run_directory
