"""Models of a directory to put a value head on: language models, and reward models with theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from fastrl.errors import InputError
from fastrl.integrations.base_models import read_model
from fastrl.integrations.tokenizer import load_tokenizer, one_line


class ValueModel(NamedTuple):
    """Layers, and the head that they came with."""

    body: Any
    head: Tensor | None  # (1, D) of a reward model


def read_value_model(
    directory: Path, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype
) -> ValueModel:
    """The model of a directory, whose vocabulary has to be that of `tokenizer`.

    A reward model, for sequence classification with one label, brings its head.
    """
    if not (directory / "config.json").is_file():
        raise InputError(
            f"critic.model must be 'head', 'lora' or the directory of a Hugging Face model, got "
            f"{str(directory)!r}, which has no config.json"
        )
    own = load_tokenizer(directory)
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"critic.model {str(directory)!r} has another vocabulary than the policy ({len(own)} "
            f"and {len(tokenizer)} tokens): it would read other words; take a model of the "
            "policy's family, or critic.model = 'head'"
        )
    architectures = AutoConfig.from_pretrained(directory, local_files_only=True).architectures
    if not any("SequenceClassification" in name for name in architectures or ()):
        return ValueModel(read_model(directory, tokenizer, dtype=dtype).base_model, None)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # every reader below raises its own kind for a broken file
        raise InputError(f"cannot load the model in {directory}: {one_line(error)}") from error
    head = getattr(model, "score", None)
    if report["missing_keys"] or head is None or head.weight.shape[0] != 1:
        raise InputError(
            f"the reward model in {directory} must have one label and all of its weights; "
            f"it lacks {', '.join(sorted(map(str, report['missing_keys']))) or 'a single score'}"
        )
    return ValueModel(model.base_model, head.weight.detach())
