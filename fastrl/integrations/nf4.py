"""Linear layers in 4 bits: NF4 with double quantisation (QLoRA, arXiv:2305.14314, section 3)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from fastrl.errors import InputError
from fastrl.weight_only import linears_of

BLOCK = 64
"""Consecutive values that share a factor."""


def check_bitsandbytes(what: str) -> None:
    """Refuse what needs bitsandbytes where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{what} needs bitsandbytes; pip install 'fastrl-llm[bitsandbytes]'")


def quantise_linears(
    model: Any, *, device: torch.device, compute_dtype: torch.dtype, skipped: Collection[str] = ()
) -> None:
    """Put the model's linear layers, its head apart, on the device in 4 bits, one after the other.

    compute_dtype: of the products. skipped: last names of modules that are left as they are. Takes
    0.5 bytes a value, and about 0.016 for the factors of the blocks.
    """
    for parent, name in linears_of(model, skipped=skipped):
        linear = getattr(parent, name)
        _check_width(name, linear, device)
        setattr(parent, name, _quantised(linear, device, compute_dtype))
    model.is_loaded_in_4bit = True  # peft asks for this before it adapts a layer of 4 bits


def _check_width(name: str, linear: nn.Linear, device: torch.device) -> None:
    """On a CPU bitsandbytes (0.50) takes the factors of other blocks where rows end within one."""
    if device.type == "cpu" and linear.in_features % BLOCK:
        raise InputError(
            f"bitsandbytes misreads 4-bit weights on a CPU unless a layer's inputs are a multiple "
            f"of {BLOCK}, but {name} has {linear.in_features}; train on a GPU or in another size"
        )


def _quantised(linear: nn.Linear, device: torch.device, compute_dtype: torch.dtype) -> nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype,
            quant_type="nf4",
        )  # fmt: skip
    # From float32 on every device, so that it does not matter what the weights were read in.
    weight = bnb.nn.Params4bit(
        linear.weight.data.float(), requires_grad=False, quant_type="nf4", module=layer
    )
    layer.weight = weight.to(device)
    layer.weight.quant_state.dtype = compute_dtype
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    # On some CPUs a pass in evaluation mode would pack the weight anew, in another order.
    layer.support_avx512bf16_for_cpu = False
    return layer.train(linear.training)


def dequantised(layer: Any) -> torch.Tensor:
    """(rows, columns) float32 weight that a layer of 4 bits stands for."""
    functional = importlib.import_module("bitsandbytes.functional")
    values: torch.Tensor = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return values.float()
