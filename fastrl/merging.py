"""A policy as one model without an adapter, in Hugging Face format."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.adapters import NAME, adapter_parameters, is_adapted
from fastrl.integrations.capabilities import without_wrappers
from fastrl.integrations.nf4 import dequantised
from fastrl.policy import Policy


@torch.no_grad()
def save_merged(policy: Policy, directory: Path) -> None:
    """Write the policy with its adapter added to the weights, and its tokenizer.

    Sums are taken in float32 and rounded once to the dtype of the base, in which all is written;
    weights of 4 bits are dequantised for them. A head that was tied to the embedding and has an
    adapter of its own is no longer tied.
    """
    if not is_adapted(policy.model):
        policy.save(directory)
        return
    base: Any = without_wrappers(policy.model)
    config = copy.deepcopy(base.config)
    state = merged_weights(policy)
    embedding, head = _names_of_ends(base)
    if head in state and not torch.equal(state[head], state[embedding]):
        config.get_text_config().tie_word_embeddings = False
        config.tie_word_embeddings = False
    with torch.device("meta"):
        bare = type(base)(config)
    bare.load_state_dict(state, strict=False, assign=True)
    bare.generation_config = base.generation_config
    bare.save_pretrained(directory, safe_serialization=True)
    policy.tokenizer.save_pretrained(directory)


def merged_weights(policy: Policy) -> dict[str, Tensor]:
    """Every parameter of the model without an adapter, by its name there, on the CPU."""
    found: dict[str, Tensor] = {}
    dtype = _dtype_of_base(policy.model)
    modules = dict(without_wrappers(policy.model).named_modules(remove_duplicate=False))
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            place = _place(path)
            if place is None:
                continue
            target = f"{place}.{name}" if place else name
            found[target] = _merged(modules, path, name, parameter).to("cpu", dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and _place(path) is not None:
                found[f"{_place(path)}.{name}"] = buffer.cpu()
    return found


def _place(path: str) -> str | None:
    """Where a module of the adapted model is without the adapter; None for the adapter's own."""
    parts = path.split(".")
    if any(part.startswith("lora_") for part in parts):
        return None
    if "original_module" in parts:
        return None  # the trained copy takes its place
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        if parts[at + 1 : at + 2] != [NAME]:
            return None
        del parts[at : at + 2]
    return ".".join(part for part in parts if part != "base_layer")


def _merged(modules: dict[str, nn.Module], path: str, name: str, parameter: nn.Parameter) -> Tensor:
    """One parameter, with what the adapter around it adds."""
    is_quantised = hasattr(parameter, "quant_state")
    weight = dequantised(modules[path]) if is_quantised else parameter.detach()
    while path.endswith(".base_layer"):  # experts in one tensor have a wrapper for each tensor
        path = path.removesuffix(".base_layer")
        delta = _delta(modules[path], name)
        weight = weight if delta is None else weight.float() + delta
    return weight


def _dtype_of_base(model: Any) -> torch.dtype:
    """Of the frozen weights that are not quantised, such as norms."""
    own = adapter_parameters(model)
    return next(
        parameter.dtype
        for name, parameter in model.named_parameters()
        if name not in own and not hasattr(parameter, "quant_state")
    )


def _delta(layer: Any, parameter: str) -> Tensor | None:
    """What the policy's adapter around a layer adds to one of its parameters, in float32."""
    if getattr(layer, "parameter_name", "weight") != parameter:
        return None
    if hasattr(layer, "parameter_name") and NAME in layer.lora_A:
        found: Tensor = layer.get_delta_weight(NAME)
        return found.float()
    if NAME in getattr(layer, "lora_embedding_A", ()):
        a, b = layer.lora_embedding_A[NAME].float(), layer.lora_embedding_B[NAME].float()
        return (b @ a).T * layer.scaling[NAME]
    if NAME not in getattr(layer, "lora_A", ()):
        return None
    a, b = layer.lora_A[NAME].weight.float(), layer.lora_B[NAME].weight.float()
    delta = (b @ a) * layer.scaling[NAME]
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


def _names_of_ends(model: Any) -> tuple[str, str]:
    """Names of the weights of embedding and head without an adapter."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    embedding, head = (_place(names[id(module)]) for module in ends)
    return f"{embedding}.weight", f"{head}.weight"
