"""Tokenizers: learnt from a task's own text, or read from a model's directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastrl.errors import InputError

END_OF_SEQUENCE = "<|endoftext|>"
PADDING = "<|pad|>"
SMALLEST_VOCABULARY = 258


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, so that numbers are read digit by digit."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # What stands between numbers may merge freely: a task's fixed wording becomes few tokens.
    split = Regex(r"\p{N}|[^\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_SEQUENCE, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_SEQUENCE, pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory, which must know how completions end."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # every reader below raises its own kind for a broken file
        raise InputError(f"cannot load the tokenizer in {directory}: {one_line(error)}") from error
    for kind in ("eos_token", "pad_token"):
        if getattr(tokenizer, kind) is None:
            raise InputError(
                f"the tokenizer in {directory} has no {kind}; set it in tokenizer_config.json"
            )
    return tokenizer


def vocabulary_size(value: Any) -> int:
    """What is asked of a fresh tokenizer, which knows every byte."""
    if isinstance(value, bool) or not isinstance(value, int) or value < SMALLEST_VOCABULARY:
        raise InputError(
            f"model.architecture.vocab_size must be a whole number, at least {SMALLEST_VOCABULARY} "
            f"(every byte and two special tokens), got {value!r}"
        )
    return value


def one_line(error: Exception) -> str:
    """What another library's error says, short enough to quote."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
