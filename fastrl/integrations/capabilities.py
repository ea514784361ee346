"""Which transformers models may be given a packed row, and why the others may not."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastrl.errors import InputError
from fastrl.integrations.hybrids import mixers_of

ATTENTION = {"full_attention", "sliding_attention"}
SERVED = {"linear_attention", "conv"}  # where each such layer has a module that is known
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class LeakError(RuntimeError):
    """A model that cannot follow a packed row, which shows only while it runs."""


def without_wrappers(model: Any) -> nn.Module:
    """The transformers model inside of torch.compile's and PEFT's wrappers."""
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise InputError("a prompt learnt by PEFT is no part of a plan; merge it or use LoRA")
    return model.get_base_model()


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of the model that reads text."""
    decoder = model.get_decoder()  # some call their head so
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def check_model(model: nn.Module) -> None:
    """Refuse a model in which completions that share a prompt would see each other.

    Convolutions and recurrent states carry information along the packed row, but for those of
    `hybrids`; what lives in a mask alone is not in the plan, and dropout would be drawn once for a
    shared prompt. What can only be seen while the model runs is checked by
    `segment_attention_enabled`.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not type(model)._can_set_attn_implementation():
        raise InputError(
            f"expected a transformers model that uses the attention interface, got {name}"
        )
    decoder = decoder_of(model)
    served = {path for path, module in decoder.named_modules() if mixers_of(module)}
    _check_config(name, decoder.config, len(served))
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise InputError(
            f"{name} takes no position_ids, so a completion could not continue its prompt's"
        )
    for path, module in decoder.named_modules():
        if isinstance(module, nn.Conv1d) and path.rpartition(".")[0] not in served:
            raise InputError(f"{name} has a convolution at {path}, which leaks between completions")
        _check_module(name, path, module)


def _check_config(name: str, config: Any, num_served: int) -> None:
    """num_served: layers without attention that follow the segments all the same."""
    others = [kind for kind in getattr(config, "layer_types", None) or () if kind not in ATTENTION]
    unknown = set(others) - (SERVED if len(others) == num_served else set())
    if unknown:
        raise InputError(
            f"{name} has layers of type {sorted(unknown)}; only attention and the layers of "
            "fastrl.integrations.hybrids follow a packed row"
        )
    if getattr(config, "attention_chunk_size", None):
        raise InputError(f"{name} uses chunked attention, which packed prefixes do not support")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {
        str(entry.get("rope_type")) for entry in (rope, *rope.values()) if isinstance(entry, dict)
    }
    if kinds & LENGTH_DEPENDENT_ROPE:
        raise InputError(
            f"{name} has rotary embeddings that depend on the longest sequence "
            f"({sorted(kinds & LENGTH_DEPENDENT_ROPE)}); packed rows would change them"
        )
    if getattr(config, "is_causal", True) is False:
        raise InputError(f"{name} attends in both directions, so completions would see each other")


def _check_module(name: str, path: str, module: nn.Module) -> None:
    if getattr(module, "is_causal", True) is False:
        raise InputError(f"{name} attends in both directions at {path}; only causal models work")
    chances = {"dropout": module.p} if isinstance(module, nn.Dropout) else vars(module)
    for what, chance in chances.items():
        is_random = "drop" in what or "jitter" in what
        if module.training and is_random and isinstance(chance, float) and chance > 0.0:
            raise InputError(
                f"{name} has {what} {chance} at {path or 'the top'}, drawn once for a shared "
                "prompt; set it to 0 in the model's config.json"
            )
