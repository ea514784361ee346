"""Models without tokenizer and task, whose tokens nobody reads: to measure them, or to count."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastrl.errors import InputError
from fastrl.integrations.base_models import FreshModel
from fastrl.integrations.tokenizer import one_line


def model_config(architecture: Path | Mapping[str, Any]) -> Any:
    """The transformers config of a config.json, of its directory, or of the fields of one."""
    try:
        if isinstance(architecture, Path):
            return AutoConfig.from_pretrained(architecture, local_files_only=True)
        fields = {"vocab_size": 320, **architecture}
        return AutoConfig.for_model(fields.pop("model_type", ""), **fields)
    except Exception as error:  # every reader below raises its own kind for a broken file
        name = architecture if isinstance(architecture, Path) else "model.architecture"
        raise InputError(f"cannot read the model's config in {name}: {one_line(error)}") from error


def bare_model(config: Any, directory: Path | None, *, seed: int, dtype: torch.dtype) -> Any:
    """The model on the CPU: with the weights of a directory, or with random ones of the seed."""
    if directory is None:
        return FreshModel(config, seed, dtype).build()
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except Exception as error:  # as above
        raise InputError(f"cannot load the model in {directory}: {one_line(error)}") from error
