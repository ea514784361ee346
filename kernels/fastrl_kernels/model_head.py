"""The head of a transformers causal language model, PEFT-wrapped or not.

S selected tokens, D hidden, V vocabulary (the weight's rows).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastrl_kernels.head import LMHead
from fastrl_kernels.nf4 import NF4Weight, from_params4bit

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Names in transformers' configurations for a factor on the logits, each read in the model's own
# `forward`.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon-H1; Muse
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM3; Inkling
INVERTED = "hyperclovax"  # its `logits_scaling` multiplies
UNSCALED = "mpt"  # its `logit_scale` is read by nothing
SOFTCAPS = (
    "final_logit_softcapping",  # Gemma, Muse, NanoChat
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)
# Multimodal models that do as their text configuration says; LLaVA, Aya Vision or Gemma 3 give
# logits without the scale and the softcap that the same text model has alone.
MULTIMODAL = (
    "cohere_compass",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "granite4_vision",
    "granite_docling",
    "hyperclovax_vision_v2",
    "inkling2",
    "inkling_mm_model",
    "mistral_large4",
    "muse_glimmer",
    "muse_spark",
    "paligemma",
)


def head_of_model(model: Any) -> LMHead:
    """Head of a transformers causal language model; tensors are shared, 4-bit statistics resolved.

    model: one that puts its last hidden state straight into an nn.Linear or a 4-bit Linear4bit of
    bitsandbytes, which PEFT may have wrapped in plain LoRA or `modules_to_save`. Raises ValueError
    for every other layer or adapter; what a model does before that layer is not looked at.
    """
    head = head_of_layer(_output_layer(model))
    config = _text_config(model.config)
    return head._replace(
        logit_scale=_logit_scale(config),
        softcap=_softcap(config),
        vocab_size=_vocab_size(config, head.weight.shape[0]),
    )


def head_of_layer(layer: Any) -> LMHead:
    """Weight, bias and adapter of a linear layer; what comes after it only the model knows."""
    layer = _active_layer(layer)
    base_layer = getattr(layer, "base_layer", layer)
    adapter_name = _adapter_name(layer, base_layer)
    head = LMHead(weight=_weight(base_layer), bias=getattr(base_layer, "bias", None))
    return head if adapter_name is None else _with_lora(head, layer, adapter_name)


def _output_layer(model: Any) -> Any:
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(
            f"expected a model with an output embedding, got {type(model).__name__}; "
            "load it with AutoModelForCausalLM"
        )
    return layer


def _active_layer(layer: Any) -> Any:
    """The head itself, or the copy that PEFT trains and uses under `modules_to_save`."""
    if hasattr(layer, "token_adapter") or hasattr(layer, "trainable_tokens_delta"):
        # Its weight is made anew from all (V, D) values at every access.
        raise ValueError(
            f"expected a head without trainable tokens, got {type(layer).__name__}, which PEFT "
            "also puts around a head tied to an embedding with some; untie them, or train the "
            "whole head by modules_to_save"
        )
    if not hasattr(layer, "modules_to_save"):
        return layer
    active = [] if layer.disable_adapters else layer.active_adapters
    if not active or any(name not in layer.modules_to_save for name in active):
        return layer.original_module
    return layer.modules_to_save[active[0]]


def _weight(layer: Any) -> Tensor | NF4Weight:
    """(V, D) weight of a linear layer without adapters."""
    weight: Any = getattr(layer, "weight", None)
    if hasattr(weight, "quant_state"):
        return from_params4bit(weight, getattr(layer, "compute_dtype", None))
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in DTYPES:
        found = f"{type(weight).__name__} of {weight.dtype}" if weight is not None else "none"
        raise ValueError(
            "expected a head of plain floating-point weights or a 4-bit one of bitsandbytes, got "
            f"{type(layer).__name__} with weight {found}; exclude the head from quantisation"
        )
    # Some subclasses normalise or quantise the weight on the way.
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise ValueError(
            f"expected a head that computes what nn.Linear does, got {type(layer).__name__} with a "
            "forward of its own; make an LMHead of its tensors if it is the same"
        )
    return weight


def _text_config(config: Any) -> Any:
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    is_read = text_config is config or config.model_type in MULTIMODAL
    if not is_read and (_logit_scale(text_config), _softcap(text_config)) != (1.0, None):
        raise ValueError(
            "expected a model whose logits have the scale and the softcap of its text "
            f"configuration, got the multimodal {config.model_type!r}, not known to apply them; "
            "make an LMHead of its tensors"
        )
    return text_config


def _logit_scale(config: Any) -> float:
    model_type = getattr(config, "model_type", "")
    scale = 1.0
    for name in MULTIPLIERS:
        factor = getattr(config, name, None)
        if factor is not None and not model_type.startswith(UNSCALED):
            scale *= factor
    for name in DIVISORS:
        divisor = getattr(config, name, None)
        if divisor is not None:
            scale *= divisor if model_type.startswith(INVERTED) else 1 / divisor
    return scale


def _softcap(config: Any) -> float | None:
    caps = (getattr(config, name, None) for name in SOFTCAPS)
    return next((cap for cap in caps if cap is not None), None)


def _vocab_size(config: Any, num_rows: int) -> int | None:
    vocab_size = config.vocab_size
    unpadded = getattr(config, "unpadded_vocab_size", None)  # Inkling drops the columns past it
    if unpadded is not None:
        vocab_size = min(vocab_size, unpadded)
    return vocab_size if vocab_size < num_rows else None


def _adapter_name(layer: Any, base_layer: Any) -> str | None:
    """Name of the active LoRA adapter of a PEFT layer, None where there is none."""
    if layer is base_layer:
        return None
    # ParamWrapper, for target_parameters, is LoRA on a weight of any orientation.
    is_lora = hasattr(layer, "lora_A") and not hasattr(layer, "parameter_name")
    if not is_lora or hasattr(base_layer, "base_layer"):
        raise ValueError(
            f"expected a plain or LoRA head, got {type(layer).__module__}.{type(layer).__name__} "
            f"around {type(base_layer).__name__}; leave the head out of this adapter"
        )
    if layer.merged:
        raise ValueError("expected an adapter apart from its base, got a merged one; unmerge it")
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or not active:
        return None
    if len(active) > 1:
        raise ValueError(f"expected one active adapter on the head, got {active}; activate one")
    return active[0]


def _with_lora(head: LMHead, layer: Any, name: str) -> LMHead:
    halves = layer.lora_A[name], layer.lora_B[name]
    is_plain = all(isinstance(half, nn.Linear) and half.bias is None for half in halves)
    is_dora = getattr(layer, "use_dora", {}).get(name) or name in getattr(layer, "lora_variant", {})
    if is_dora or not is_plain or getattr(layer, "fan_in_fan_out", False):
        raise ValueError(
            f"expected plain LoRA on the head, got adapter {name!r} with DoRA, another variant, "
            "lora_bias or fan_in_fan_out; leave the head out of it"
        )
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)  # nn.Identity where there is none
    if layer.training and dropout > 0:
        raise ValueError(
            f"expected no dropout on the head, got lora_dropout={dropout} in training mode; "
            "set lora_dropout=0"
        )
    return head._replace(
        lora_a=halves[0].weight, lora_b=halves[1].weight, lora_scale=layer.scaling[name]
    )
