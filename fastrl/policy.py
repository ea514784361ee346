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
from transformers import PreTrainedTokenizerBase

from fastrl.adapters import ADAPTER_CONFIG, is_adapted, load_adapter, save_adapter, with_adapter
from fastrl.config import ModelConfig
from fastrl.errors import InputError
from fastrl.integrations.base_models import FreshModel, fresh_model, read_model
from fastrl.integrations.capabilities import without_wrappers
from fastrl.integrations.chunked_mlp import chunk_mlps
from fastrl.integrations.liger import use_liger_kernel
from fastrl.integrations.nf4 import quantise_linears
from fastrl.integrations.offload import offload_checkpoints
from fastrl.integrations.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size
from fastrl.memory_modes import check_memory_modes
from fastrl.packing import Plan
from fastrl.precision import frozen_dtype, head_in_float32, store_weights, trained_dtype
from fastrl_kernels import LMHead

BASE = "base"
"""Folder of a run with the weights below its adapters, where no other directory has them."""


class Policy:
    """A causal language model that gives hidden states for packed plans."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, bf16: bool = False,
        cast_lm_head_to_fp32: bool = False, base: Path | FreshModel | None = None,
    ) -> None:  # fmt: skip
        """bf16: layers run under bfloat16 autocast. base: of the weights below an adapter."""
        self.model = model
        self.tokenizer = tokenizer
        self.bf16 = bf16
        self.cast_lm_head_to_fp32 = cast_lm_head_to_fp32
        self.base = base
        eos = model.generation_config.eos_token_id
        known = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self.eos_token_ids: list[int] = sorted({*known, tokenizer.eos_token_id})

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.model.device

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied embedding counted once and one of 4 bits as the values it has."""
        return sum(
            parameter.quant_state.shape.numel()
            if hasattr(parameter, "quant_state")
            else parameter.numel()
            for parameter in self.model.parameters()
        )

    @property
    def is_half(self) -> bool:
        """Whether layers compute in half precision, so that another batch rounds otherwise."""
        body = self.body
        weights = (x for x in body.parameters() if x.is_floating_point())
        return self.bf16 or any(x.dtype in (torch.bfloat16, torch.float16) for x in weights)

    @property
    def has_bf16_stream(self) -> bool:
        """Whether the sum that runs through the layers is in bfloat16, as their weights are."""
        embedding: Tensor = self.model.get_input_embeddings().weight
        return embedding.dtype == torch.bfloat16

    def hidden_states(self, plan: Plan) -> Tensor:
        """(N, D) final hidden states of a packed plan, in the dtype of the head.

        Only those of `plan.source_index` count: the last layer leaves out what else it can.
        """
        with plan.attach(self.model, source_rows_only=True), self.autocast():
            hidden = self.body(**plan.inputs).last_hidden_state[0]
        return hidden.to(self.head_dtype)

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
    def head_dtype(self) -> torch.dtype:
        """What hidden states are given to the head in."""
        if self.cast_lm_head_to_fp32:
            return torch.float32
        return LMHead.from_model(self.model).weight.dtype

    @property
    def lm_head(self) -> LMHead:
        """The output projection, read from the model anew so that it follows its weights.

        With `cast_lm_head_to_fp32` a float32 copy, made anew every time: keep it no longer than a
        pass.
        """
        head = LMHead.from_model(self.model)
        return head_in_float32(head) if self.cast_lm_head_to_fp32 else head

    def frozen_copy(self) -> Policy:
        """A copy that no longer changes."""
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        return Policy(
            model, self.tokenizer, bf16=self.bf16,
            cast_lm_head_to_fp32=self.cast_lm_head_to_fp32, base=self.base,
        )  # fmt: skip

    def save(self, directory: Path) -> None:
        """Write config, safetensors weights and tokenizer in Hugging Face format.

        Of a policy with an adapter only the adapter, in peft's format, with the path of its base;
        `fastrl.merging.save_merged` writes the whole.
        """
        if is_adapted(self.model):
            base = self.base.absolute() if isinstance(self.base, Path) else None
            save_adapter(self.model, directory, base=None if base is None else str(base))
        else:
            self.model.save_pretrained(directory, safe_serialization=True)
        self.tokenizer.save_pretrained(directory)

    def save_base(self, run_directory: Path) -> None:
        """Write the weights below the adapter into the run, once, where nothing else has them.

        They are built anew from the seed, as those in memory may be rounded to 4 bits. Does nothing
        for a policy without adapter, or whose base is a directory.
        """
        if isinstance(self.base, FreshModel):
            self.base.build().save_pretrained(run_directory / BASE, safe_serialization=True)
            self.tokenizer.save_pretrained(run_directory / BASE)
            self.base = run_directory / BASE


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


def load_policy(config: ModelConfig, directory: str | Path, *, seed: int = 0) -> Policy:
    """A policy from a Hugging Face directory, or from a checkpoint of one; nothing is downloaded.

    With `config.lora` it has a fresh adapter, a function of the seed; a checkpoint has an adapter
    alone, whose base is `config.path`, or else in the run that the checkpoint is in.
    """
    directory, device = Path(directory), resolve_device(config.device)
    check_memory_modes(config, device)
    if not directory.is_dir():
        raise InputError(f"no model directory at {directory}; give a local Hugging Face directory")
    is_adapter = (directory / ADAPTER_CONFIG).is_file()
    if is_adapter and not config.lora:
        raise InputError(
            f"{directory} holds an adapter; set model.lora as it was trained, or merge it first "
            "(fastrl merge)"
        )
    base = directory
    if is_adapter:
        base = directory.parent / BASE if config.path is None else Path(config.path)
    if not (base / "config.json").is_file():
        raise InputError(f"{base} has no config.json; give a Hugging Face model directory")
    tokenizer = load_tokenizer(directory)
    model = read_model(base, tokenizer, dtype=_dtype_of_base(config))
    policy = _assembled(model, tokenizer, config, base=base, seed=seed)
    if is_adapter:
        load_adapter(policy.model, directory)
    return policy


def new_policy(config: ModelConfig, texts: Sequence[str], *, seed: int) -> Policy:
    """A fresh policy of `config.architecture` whose tokenizer is learnt from `texts`."""
    check_memory_modes(config, resolve_device(config.device))
    fields = dict(config.architecture)
    vocab_size = vocabulary_size(fields.pop("vocab_size", 320))
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    base = fresh_model(fields, tokenizer, seed=seed, dtype=_dtype_of_base(config))
    return _assembled(base.build(), tokenizer, config, base=base, seed=seed)


def _dtype_of_base(config: ModelConfig) -> torch.dtype:
    return frozen_dtype(config.precision) if config.lora else trained_dtype(config.precision)


def _assembled(
    model: Any, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, *,
    base: Path | FreshModel, seed: int,
) -> Policy:  # fmt: skip
    """The model where it trains, in training mode (dropout is refused when a plan is attached)."""
    device = resolve_device(config.device)
    if config.use_liger_kernel:
        use_liger_kernel(model)
    if config.mlp_chunk_size:
        chunk_mlps(model, config.mlp_chunk_size)
    if config.gradient_checkpointing:
        # Newer transformers call it activation checkpointing.
        new_name = getattr(model, "activation_checkpointing_enable", None)
        (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if config.activation_offloading:
        offload_checkpoints(model, device)
    if config.lora:
        model = _adapted(model, config, device, seed=seed)
    store_weights(
        model, trained=trained_dtype(config.precision), frozen=frozen_dtype(config.precision)
    )
    return Policy(
        model.to(device).train(), tokenizer, bf16=config.precision == "autocast",
        cast_lm_head_to_fp32=config.cast_lm_head_to_fp32, base=base if config.lora else None,
    )  # fmt: skip


def _adapted(model: Any, config: ModelConfig, device: torch.device, *, seed: int) -> Any:
    """The model frozen, in 4 bits where asked for, under a fresh adapter."""
    model.requires_grad_(False)
    if config.load_in_4bit:
        quantise_linears(
            model, device=device, compute_dtype=frozen_dtype(config.precision),
            skipped=config.lora.get("modules_to_save") or (),
        )  # fmt: skip
    return with_adapter(model, config.lora, seed=seed)
