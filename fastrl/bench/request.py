"""What `fastrl bench` was asked for, read off its words before torch is loaded.

Legend: P prompts, G num_generations, R completion tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.cli_configs import model_fields, model_or_config
from fastrl.config import Config, ModelConfig, RolloutConfig
from fastrl.config_io import override_config
from fastrl.errors import InputError
from fastrl.words import no_more, take_json_path, take_path, take_switch, take_value

USAGE = """usage: fastrl bench MODEL_DIR|CONFIG.json|CONFIG.toml [ARGUMENTS]

Measures what each technique gives an update of this model, and recommends settings.

  --prompt-length P      tokens of a prompt (256, or the config's longest)
  --completion-length R  most tokens of a completion (128, or the config's)
  --num-generations G    completions of a prompt (8, or the config's)
  --prompts N            prompts of the update (4)
  --method NAME          whose down-sampling decides what is trained (grpo, or the config's)
  --fixed-lengths        all completions have R tokens, not R/2 on average
  --zero-spread F        share of the prompts whose completions all score alike (0.25)
  --max-tokens-per-pass  packed tokens, or padded ones, of a pass (4096, or the config's)
  --precision NAME       as model.precision (float32; split on a GPU)
  --device NAME          auto, cpu, cuda or cuda:N
  --memory-limit GIB     recommend only what stays within it
  --seconds S            time for all of it (100)
  --json PATH            write everything that was measured
  --toml PATH            write the recommended settings"""

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
FIELDS = {
    "--prompt-length": "rollout.max_prompt_length",
    "--completion-length": "rollout.max_completion_length",
    "--num-generations": "rollout.num_generations",
    "--prompts": "prompts_per_step",
    "--method": "method",
    "--max-tokens-per-pass": "max_tokens_per_pass",
    "--precision": "model.precision",
    "--device": "model.device",
}
DEFAULTS = Config(
    prompts_per_step=4,
    rollout=RolloutConfig(max_prompt_length=256, max_completion_length=128),
)


@dataclass(frozen=True)
class Request:
    """The update to measure, as the config of a run that would make it, and how to measure it."""

    config: Config
    directory: Path | None
    """Where the weights are; None for random ones."""
    architecture: Path | dict[str, Any]
    """A Hugging Face config.json, its directory, or the fields of one."""
    chooses: frozenset[str]
    """What is up to the bench: config fields that nobody gave, and "model" if only that was."""
    is_fixed_length: bool
    zero_spread: float
    seconds: float
    memory_limit: float | None
    """Bytes."""
    json_path: str | None
    toml_path: Path | None


def take_request(words: list[str]) -> Request:
    """The request of a command line; InputError where it cannot be one."""
    if not words or words[0].startswith("-"):
        raise InputError("give a model directory or a config: fastrl bench MODEL_DIR|CONFIG.toml")
    source = Path(words.pop(0))
    json_path, toml_path = take_json_path(words), take_path(words, "--toml")
    if toml_path is not None and not toml_path.absolute().parent.is_dir():
        raise InputError(f"--toml {toml_path}: expected a file in an existing directory")
    is_fixed_length = take_switch(words, "--fixed-lengths")
    zero_spread = _number(words, "--zero-spread", 0.25, least=0.0, most=1.0)
    seconds = _number(words, "--seconds", 100.0, least=1.0)
    limit = take_value(words, "--memory-limit")
    memory_limit = None
    if limit is not None:
        memory_limit = 2**30 * _number(["--memory-limit", limit], "--memory-limit", 0.0, least=1e-3)
    given = {flag: take_value(words, flag) for flag in FIELDS}
    no_more(words)
    config, chooses = _config_of(source, given)
    flags = [
        word
        for flag, value in given.items()
        if value is not None
        for word in ("--" + FIELDS[flag].replace("_", "-"), value)
    ]
    config = override_config(config, flags, "fastrl bench")
    if config.rollout.num_generations == 1 and chooses and not given["--method"]:
        config = dataclasses.replace(config, method="reinforce")  # GRPO compares completions
    directory, architecture = _model_of(config.model)
    return Request(
        config, directory, architecture, chooses, is_fixed_length, zero_spread, seconds,
        memory_limit, json_path, toml_path,
    )  # fmt: skip


def _config_of(source: Path, given: dict[str, str | None]) -> tuple[Config, frozenset[str]]:
    """The config that the flags change, and the fields that neither it nor they decide."""
    flags = ("--max-tokens-per-pass", "--precision")
    free = {"model", *(FIELDS[flag] for flag in flags if not given[flag])}
    config, is_run = model_or_config(source, DEFAULTS)
    if is_run:
        return dataclasses.replace(config, prompts_per_step=4), frozenset()
    return config, frozenset(free)


def _model_of(model: ModelConfig) -> tuple[Path | None, Path | dict[str, Any]]:
    """Where weights are, if anywhere, and what says the model's shape."""
    if model.load_in_4bit:
        raise InputError("fastrl bench runs no 4-bit weights; set model.load_in_4bit = false")
    if model.path is None:
        if not model.architecture:
            raise InputError("no model given; set model.path or model.architecture")
        return None, model.architecture
    path = Path(model.path)
    if path.is_dir() and (path / "config.json").is_file():
        has_weights = any(any(path.glob(pattern)) for pattern in WEIGHTS)
        return (path if has_weights else None), path
    if not path.is_file():
        raise InputError(f"no model directory at {path}; give a local Hugging Face directory")
    model_fields(path)
    return None, path


def _number(
    words: list[str], flag: str, default: float, *, least: float, most: float = float("inf")
) -> float:
    """The number behind a flag, from `least` to `most`."""
    text = take_value(words, flag)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError as error:
        raise InputError(f"{flag} must be a number, got {text!r}") from error
    if not least <= value <= most:
        end = "" if most == float("inf") else f" and at most {most:g}"
        raise InputError(f"{flag} must be at least {least:g}{end}, got {text}")
    return value
