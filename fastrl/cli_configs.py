"""The config that the words of a command line name, with the flags behind it applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def model_or_config(source: Path, defaults: Config) -> tuple[Config, bool]:
    """The config of a run or a TOML file; or `defaults` with the model of a Hugging Face directory
    or of a file such as its config.json. Whether it is the former.
    """
    from dataclasses import replace

    from fastrl.config import ModelConfig
    from fastrl.config_io import load_config

    if source.is_dir() and not (source / "config.json").is_file():
        if not (source / "config.toml").is_file():
            raise InputError(
                f"{source} has neither config.json nor config.toml; give a Hugging Face model "
                "directory, a run or a config"
            )
        source = source / "config.toml"
    if not source.exists():
        raise InputError(
            f"no model directory and no config at {source}; nothing is downloaded, so give a path"
        )
    if source.suffix == ".toml":
        return load_config(source), True
    if source.is_file() and source.suffix != ".json":
        raise InputError(f"{source} is neither a directory nor a .json or .toml file")
    return replace(defaults, model=ModelConfig(path=str(source))), False


def model_fields(path: Path) -> dict[str, Any]:
    """What a config.json, by whatever name, says of a model."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise InputError(f"{path} has no model_type; give the config.json of a model")
    return fields
