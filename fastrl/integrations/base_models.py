"""Causal language models of transformers: read from a directory, or fresh from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from fastrl.errors import InputError, nearest
from fastrl.integrations.tokenizer import one_line
from fastrl.precision import store_weights
from fastrl.seeding import derive_seed


class FreshModel(NamedTuple):
    """A model that a seed makes, as often as it is asked for."""

    config: Any  # of transformers
    seed: int
    dtype: torch.dtype

    def build(self) -> Any:
        """The model on the CPU: the same bits every time, and no random stream moves."""
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.seed, "weights"))
                model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        except Exception as error:  # shape mistakes surface as whatever the layer happens to raise
            raise InputError(f"cannot build model.architecture: {one_line(error)}") from error
        store_weights(model, trained=self.dtype, frozen=self.dtype)
        return model


def fresh_model(
    architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *,
    seed: int, dtype: torch.dtype,
) -> FreshModel:  # fmt: skip
    """A model of the given fields of a transformers config, for a tokenizer; not built yet."""
    fields = dict(architecture)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise InputError("model.architecture needs model_type, for example model_type = 'qwen3'")
    special = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    try:
        defaults = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise InputError(f"unknown model.architecture.model_type {model_type!r}") from error
    for key in fields:
        if key in special or not hasattr(defaults, key):
            hint = nearest(key, sorted(defaults.to_dict()))
            raise InputError(f"model.architecture.{key} cannot be set for {model_type}; {hint}")
    try:
        return FreshModel(AutoConfig.for_model(model_type, **fields, **special), seed, dtype)
    except Exception as error:  # as in FreshModel.build
        raise InputError(f"cannot build model.architecture: {one_line(error)}") from error


def read_model(directory: Path, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype) -> Any:
    """The model of a Hugging Face directory on the CPU; nothing is downloaded."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # every reader below raises its own kind for a broken file
        raise InputError(f"cannot load the model in {directory}: {one_line(error)}") from error
    broken = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if broken:
        raise InputError(
            f"the weights in {directory} lack {len(broken)} tensors of the model ({broken[0]}, ...)"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise InputError(
            f"the tokenizer in {directory} has token ids up to {highest} but the model embeds "
            f"{rows}; they do not belong together"
        )
    return model
