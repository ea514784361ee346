"""LoRA adapters of peft: put on a model, saved, restored, merged.

An adapter adds scale * B A to a weight W (arXiv:2106.09685). B is 0 at first, so that the model
starts as its base; only A and B are trained, and the weights below are one copy for the policy and
its reference.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrl.errors import InputError, nearest
from fastrl.seeding import derive_seed

NAME = "default"
"""Of the policy's adapter."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip
"""Of peft.LoraConfig that leave the weights below as they are: these are the reference policy."""


def check_lora(lora: Mapping[str, Any]) -> None:
    """Refuse what a run could not train, before any model is there."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("model.lora needs peft; pip install 'fastrl-llm[peft]'")
    for key, value in lora.items():
        if key not in FIELDS:
            raise InputError(f"model.lora.{key} cannot be set; {nearest(key, list(FIELDS))}")
        if key == "lora_dropout" and value:
            raise InputError(
                f"model.lora.lora_dropout must be 0, got {value}: dropout would be drawn once for "
                "a prompt that completions share, and sampling is without it"
            )
        if key == "init_lora_weights" and value not in (True, "gaussian"):
            raise InputError(
                f"model.lora.init_lora_weights must be true or 'gaussian', got {value!r}: others "
                "begin with a policy that is not the base"
            )


def is_adapted(model: Any) -> bool:
    """Whether peft has wrapped the model."""
    return hasattr(model, "peft_config")


def with_adapter(model: Any, lora: Mapping[str, Any], *, seed: int, name: str = NAME) -> Any:
    """The model with a fresh adapter, a function of the seed and the adapter's name.

    lora: fields of peft.LoraConfig; target_modules is all-linear unless given, which leaves the
    head out. A model that has an adapter gets one more, which `adapter_in_use` lets it run with.
    """
    import peft

    check_lora(lora)
    fields = {"target_modules": "all-linear", **lora}
    try:
        config = peft.LoraConfig(**fields, task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ties, which `merged_weights` resolves
            torch.manual_seed(derive_seed(seed, f"adapter {name}"))
            if is_adapted(model):
                model.add_adapter(name, config)
            else:
                model = peft.get_peft_model(
                    model, config, adapter_name=name, autocast_adapter_dtype=False
                )
    except (ValueError, TypeError) as error:
        if isinstance(fields["target_modules"], list | tuple):
            _check_targets(model, fields["target_modules"], [], "target_modules")
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.lora does not fit the model: {reason}") from error
    _check_names(model, fields, name)
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(True)
    return model


def _check_names(model: Any, fields: Mapping[str, Any], name: str) -> None:
    """Every name in a list must be that of some module; peft is content with one of them."""
    adapted, copied = [], []
    for path, module in model.named_modules():
        if any(name in getattr(module, half, ()) for half in ("lora_A", "lora_embedding_A")):
            adapted.append(path)
        if name in _copies_to_train(module):
            copied.append(path)
    for key, found in (("target_modules", adapted), ("modules_to_save", copied)):
        if isinstance(fields.get(key), list | tuple):
            _check_targets(model, fields[key], found, key)


def _copies_to_train(module: nn.Module) -> Any:
    copies = getattr(module, "modules_to_save", ())
    return copies if isinstance(copies, nn.ModuleDict) else ()


def _check_targets(model: Any, targets: Any, found: list[str], key: str) -> None:
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in found):
            known = {
                path.rpartition(".")[2]
                for path, module in model.named_modules()
                if hasattr(module, "weight") and not path.endswith("base_layer")
            }
            raise InputError(
                f"model.lora.{key} has {target!r}, but no module that can be adapted is called so; "
                f"{nearest(str(target), sorted(known))}"
            )


def adapter_tensors(model: Any, name: str = NAME) -> dict[str, Tensor]:
    """The tensors that belong to an adapter, by their names in peft's files; they are shared."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings, which are saved where they are trained
        found = peft.get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        )
    return dict(found)


def adapter_parameters(model: Any, name: str = NAME) -> dict[str, nn.Parameter]:
    """The parameters that belong to an adapter, trained or not at the moment."""
    return {
        path: parameter
        for path, parameter in model.named_parameters()
        if f".{name}." in f"{path}." and (".lora_" in path or ".modules_to_save." in path)
    }


def save_adapter(model: Any, directory: Path, *, base: str | None, name: str = NAME) -> None:
    """Write an adapter in peft's format; base: where the weights below it are."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        path: tensor.detach().cpu().contiguous().clone()
        for path, tensor in adapter_tensors(model, name).items()
    }
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = dataclasses.replace(
        model.peft_config[name], inference_mode=True, base_model_name_or_path=base
    )
    config.save_pretrained(str(directory))


def load_adapter(model: Any, directory: Path, name: str = NAME) -> None:
    """Give the model's adapter the values of a saved one, to the bit."""
    path = directory / ADAPTER_WEIGHTS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot load the adapter in {directory}: {error}") from error
    own = adapter_tensors(model, name)
    differing = sorted(
        key for key in {*own, *saved} if key not in own or key not in saved
        or own[key].shape != saved[key].shape
    )  # fmt: skip
    if differing:
        raise InputError(
            f"the adapter in {directory} is not that of model.lora: {len(differing)} tensors "
            f"differ ({differing[0]}, ...); keep to the fields that it was trained with"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(saved[key])


def is_untouched(model: Any, name: str = NAME) -> bool:
    """Whether the adapter adds nothing yet, so that the model is its base."""
    for module in model.modules():
        for half in ("lora_B", "lora_embedding_B"):
            if name in getattr(module, half, ()):
                trained = getattr(module, half)[name]
                if bool(getattr(trained, "weight", trained).any()):
                    return False
        copies = _copies_to_train(module)
        if name in copies:
            original, copy = module.original_module, copies[name]
            pairs = zip(original.parameters(), copy.parameters(), strict=True)
            if not all(torch.equal(a.to(b), b) for a, b in pairs):
                return False
    return True


@contextmanager
def adapter_in_use(model: Any, name: str) -> Iterator[None]:
    """Within the block the model runs with another of its adapters."""
    before = model.active_adapters
    with _gradients_left_alone(model):
        model.base_model.set_adapter(name)
        try:
            yield
        finally:
            model.base_model.set_adapter(before)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within the block the model is its base: what it was before it had adapters."""
    with _gradients_left_alone(model), model.disable_adapter():
        yield


@contextmanager
def _gradients_left_alone(model: nn.Module) -> Iterator[None]:
    """peft's switches also say which parameters want a gradient; not so here."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, wants in wanted.items():
            parameter.requires_grad_(wants)
