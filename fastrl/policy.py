"""The language model that is trained, with its tokenizer.

Legend: N packed tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fastrl.config import ModelConfig
from fastrl.errors import InputError, nearest
from fastrl.integrations.capabilities import without_wrappers
from fastrl.packing import Plan
from fastrl.seeding import derive_seed
from fastrl_kernels import LMHead

END_OF_SEQUENCE = "<|endoftext|>"
PADDING = "<|pad|>"
SMALLEST_VOCABULARY = 258


class Policy:
    """A causal language model that gives hidden states for packed plans."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, bf16: bool = False
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.bf16 = bf16
        eos = model.generation_config.eos_token_id
        known = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self.eos_token_ids: list[int] = sorted({*known, tokenizer.eos_token_id})

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.model.device

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def hidden_states(self, plan: Plan) -> Tensor:
        """(N, D) final hidden states of a packed plan, in the dtype of the head.

        Only those of `plan.source_index` count: the last layer leaves out what else it can.
        """
        with plan.attach(self.model, source_rows_only=True), self.autocast():
            hidden = self.body(**plan.inputs).last_hidden_state[0]
        return hidden.to(self.lm_head.weight.dtype)

    @property
    def body(self) -> Any:
        """The model without its head and without wrappers: input ids to final hidden states."""
        return without_wrappers(self.model).base_model

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode within the block."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of the layers: bfloat16 where the config says so."""
        if self.bf16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @property
    def lm_head(self) -> LMHead:
        """The output projection, read from the model anew so that it follows its weights."""
        return LMHead.from_model(self.model)

    def frozen_copy(self) -> Policy:
        """A copy that no longer changes, to serve as the reference policy."""
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        return Policy(model, self.tokenizer, bf16=self.bf16)

    def save(self, directory: Path) -> None:
        """Write config, safetensors weights and tokenizer in Hugging Face format."""
        self.model.save_pretrained(directory, safe_serialization=True)
        self.tokenizer.save_pretrained(directory)


def resolve_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N as a device that exists here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"model.device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"model.device is {name!r} but there are {torch.cuda.device_count()} GPUs; use auto"
        )
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"model.device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def load_policy(config: ModelConfig, directory: str | Path) -> Policy:
    """A policy from a Hugging Face directory; nothing is downloaded."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no model directory at {directory}; give a local Hugging Face directory")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} has no config.json; give a Hugging Face model directory")
    tokenizer = _load_tokenizer(directory)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # every reader below raises its own kind for a broken file
        raise InputError(f"cannot load the model in {directory}: {_one_line(error)}") from error
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
    return Policy(_placed(model, config), tokenizer, bf16=config.precision == "autocast")


def new_policy(config: ModelConfig, texts: Sequence[str], *, seed: int) -> Policy:
    """A fresh policy of `config.architecture` whose tokenizer is learnt from `texts`."""
    fields = dict(config.architecture)
    tokenizer = train_tokenizer(texts, vocab_size=_vocab_size(fields.pop("vocab_size", 320)))
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
        architecture = AutoConfig.for_model(model_type, **fields, **special)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "weights"))
            model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    except Exception as error:  # shape mistakes surface as whatever the layer happens to raise
        raise InputError(f"cannot build model.architecture: {_one_line(error)}") from error
    return Policy(_placed(model, config), tokenizer, bf16=config.precision == "autocast")


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


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise InputError(f"cannot load the tokenizer in {directory}: {_one_line(error)}") from error
    for kind in ("eos_token", "pad_token"):
        if getattr(tokenizer, kind) is None:
            raise InputError(
                f"the tokenizer in {directory} has no {kind}; set it in tokenizer_config.json"
            )
    return tokenizer


def _placed(model: Any, config: ModelConfig) -> Any:
    """The model where it trains, in training mode (dropout is refused when a plan is attached)."""
    model = model.to(resolve_device(config.device)).train()
    if config.gradient_checkpointing:
        # Newer transformers call it activation checkpointing.
        new_name = getattr(model, "activation_checkpointing_enable", None)
        (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def _vocab_size(value: Any) -> int:
    """What is asked of a fresh tokenizer, which knows every byte."""
    if isinstance(value, bool) or not isinstance(value, int) or value < SMALLEST_VOCABULARY:
        raise InputError(
            f"model.architecture.vocab_size must be a whole number, at least {SMALLEST_VOCABULARY} "
            f"(every byte and two special tokens), got {value!r}"
        )
    return value


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
