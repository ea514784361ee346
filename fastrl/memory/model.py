"""The policy of a configuration without its weights: on "meta", whole or with fewer layers.

The layers of a model repeat. What a pass takes is found out on a model with few of them, and grows
evenly with the others.

Legend: L layers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from fastrl.activations import INPUTS_ON_DEVICE
from fastrl.adapters import with_adapter
from fastrl.config import ModelConfig
from fastrl.errors import InputError
from fastrl.integrations.bare_models import bare_model, model_config
from fastrl.integrations.capabilities import check_model, decoder_of, without_wrappers
from fastrl.integrations.chunked_mlp import chunk_mlps
from fastrl.integrations.offload import offload_checkpoints
from fastrl.memory.arithmetic import autocast
from fastrl.memory.four_bits import quantise_on_meta
from fastrl.policy import Policy
from fastrl.precision import frozen_dtype, store_weights, trained_dtype

FEW_LAYERS = 4
"""Of alike layers: the first, the last, and some in between."""
FEW_OFFLOADED = FEW_LAYERS + INPUTS_ON_DEVICE
"""Where inputs of layers come and go, until as many are there as ever."""
META = torch.device("meta")
SPECIAL_TOKENS = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
"""Of a fresh policy; its own are not known before its tokenizer."""
_NO_TOKENIZER: Any = SimpleNamespace(eos_token_id=0)


class MetaPolicy(Policy):
    """A policy on "meta", whose arithmetic is that of the device it stands for."""

    def __init__(self, model: Any, settings: ModelConfig) -> None:
        super().__init__(
            model, _NO_TOKENIZER, bf16=settings.precision == "autocast",
            cast_lm_head_to_fp32=settings.cast_lm_head_to_fp32,
        )  # fmt: skip
        self.settings = settings

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """See `Policy`."""
        return autocast() if self.bf16 else contextlib.nullcontext()

    def frozen_copy(self) -> MetaPolicy:
        """See `Policy`."""
        return self.with_model(copy.deepcopy(self.model).eval().requires_grad_(False))

    def copied(self) -> MetaPolicy:
        """The same once more."""
        return self.with_model(copy.deepcopy(self.model))

    def with_model(self, model: Any) -> MetaPolicy:
        """Another model in the same arithmetic."""
        return MetaPolicy(model, self.settings)


class Fewer(NamedTuple):
    """Numbers of layers that tell what all L of them take; the same twice where L are few."""

    first: int
    second: int


def architecture_of(settings: ModelConfig) -> Any:
    """The transformers config of the policy."""
    if settings.path is not None:
        if settings.architecture:
            raise InputError("model.path and model.architecture exclude each other; remove one")
        return model_config(Path(settings.path))
    if not settings.architecture:
        raise InputError("no model given; set model.path or model.architecture")
    return model_config({**settings.architecture, **SPECIAL_TOKENS})


def whole_model(config: Any, settings: ModelConfig, *, device: str) -> Any:
    """The model with its adapter in the dtypes of `settings`, without its memory modes.

    config: of transformers. device: "cpu" or "cuda", where it would train.
    """
    trained, frozen = trained_dtype(settings.precision), frozen_dtype(settings.precision)
    with META, _quiet():
        model = bare_model(config, None, seed=0, dtype=frozen if settings.lora else trained)
        if model.get_output_embeddings() is None:
            raise InputError(f"{type(model).__name__} has no head to make logits with")
        if settings.lora:
            model.requires_grad_(False)
            if settings.load_in_4bit:
                quantise_on_meta(
                    model, device=device, compute_dtype=frozen,
                    skipped=settings.lora.get("modules_to_save") or (),
                )  # fmt: skip
            model = with_adapter(model, settings.lora, seed=0)
    store_weights(model, trained=trained, frozen=frozen)
    check_model(without_wrappers(model.train()))
    return model


def value_body(config: Any, precision: str) -> Any:
    """The layers of a value model that is a directory's."""
    with META, _quiet():
        model = bare_model(config, None, seed=0, dtype=trained_dtype(precision))
    return model.base_model.train()


def with_modes(model: Any, settings: ModelConfig, *, device: str) -> MetaPolicy:
    """The policy of a model with the memory modes of `settings`; changes the model.

    device: "cpu" or "cuda", which it stands for.
    """
    inner: Any = without_wrappers(model)
    if settings.mlp_chunk_size:
        chunk_mlps(inner, settings.mlp_chunk_size)
    if settings.gradient_checkpointing:
        recompute(inner)
    if settings.activation_offloading:
        offload_checkpoints(inner, META)
    return MetaPolicy(model, settings)


def recompute(model: Any) -> None:
    """Switch gradient checkpointing on, as `fastrl.policy` does."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def layers_of(model: Any) -> nn.ModuleList | None:
    """The list of the decoder's layers; None for a model that keeps them otherwise."""
    decoder = decoder_of(without_wrappers(model))
    count = decoder.config.num_hidden_layers
    lists = [x for x in decoder.children() if isinstance(x, nn.ModuleList) and len(x) == count]
    return lists[0] if len(lists) == 1 else None


def fewer_layers(model: Any, *, least: int = FEW_LAYERS) -> Fewer:
    """How many layers tell what all of them take, at least so many.

    A model begins with some layers of their own kind, and then p kinds take turns to its end; both
    numbers leave out whole turns, and the second has one more than the first.
    """
    layers = layers_of(model)
    if layers is None:
        count = decoder_of(without_wrappers(model)).config.num_hidden_layers
        return Fewer(count, count)
    kinds = _kinds(model, layers)
    L = len(kinds)
    start, turn = min(
        ((start, turn) for turn in range(1, L) for start in range(L - turn)
         if all(kinds[i] == kinds[i + turn] for i in range(start, L - turn))),
        key=sum, default=(0, L),
    )  # fmt: skip
    first = L
    while first - turn >= max(least, start + turn):
        first -= turn
    return Fewer(first, first + turn) if 2 * first + turn < L else Fewer(L, L)


def _kinds(model: Any, layers: nn.ModuleList) -> list[Any]:
    """What tells layers of different kinds apart."""
    config = decoder_of(without_wrappers(model)).config
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    found = []
    for kind, layer in zip(types, layers, strict=True):
        classes = tuple(type(module).__name__ for module in layer.modules())
        shapes = tuple((name, tuple(x.shape), x.dtype) for name, x in layer.named_parameters())
        found.append((kind, classes, shapes))
    return found


def with_layers(model: Any, count: int) -> Any:
    """A copy of the model with its first layers alone."""
    layers = layers_of(model)
    if layers is None or len(layers) == count:
        return copy.deepcopy(model)
    left_out = {id(layer): None for layer in layers[count:]}
    # Not copied, as copying takes longer than running.
    found = copy.deepcopy(model, dict(left_out))
    rest = layers_of_any(found, len(layers))
    del rest[count:]
    config = decoder_of(without_wrappers(found)).config
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == len(layers):
            setattr(config, name, value[:count])
    config.num_hidden_layers = count
    return found


def layers_of_any(model: Any, count: int) -> nn.ModuleList:
    """The list of so many layers."""
    found = layers_of(model)
    assert found is not None
    assert len(found) == count
    return found


def same_weights(settings: ModelConfig) -> ModelConfig:
    """The settings without what does not change a weight: models of two of them are alike."""
    return dataclasses.replace(
        settings, gradient_checkpointing=False, activation_offloading=False, mlp_chunk_size=0,
        use_liger_kernel=False, cast_lm_head_to_fp32=False, reference="auto", device="auto",
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of libraries about names that they will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
