"""Adapters folded into the weights they adapt, and taken out again to the bit.

PEFT's own unmerging subtracts what it added, which rounds; here the weights come back from a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.errors import InputError


def adapted_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers with an active adapter that can be merged."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "merged_adapters")
        and hasattr(module, "get_base_layer")
        and not module.disable_adapters
        and not module.merged
    ]


@contextmanager
@torch.no_grad()
def folded_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block a linear layer with an adapter is one product.

    A copy of every adapted weight is kept meanwhile, in the memory of the CPU. Raises InputError
    for quantised weights, which cannot hold an adapter without rounding.
    """
    layers = adapted_layers(model)
    for layer in layers:
        weight = layer.get_base_layer().weight
        if not weight.is_floating_point() or type(weight) is not nn.Parameter:
            raise InputError(
                f"fold_adapters needs plain floating-point weights, got {type(weight).__name__} of "
                f"{weight.dtype}: quantised ones would round the adapter; remove it"
            )
    copies = [_copies(layer.get_base_layer()) for layer in layers]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, kept in zip(layers, copies, strict=True):
            for name, copy in kept.items():
                getattr(layer.get_base_layer(), name).data.copy_(copy)
            layer.merged_adapters.clear()


def _copies(base: Any) -> dict[str, Tensor]:
    """Weight and bias of a layer, in the memory of the CPU."""
    found = {"weight": base.weight, "bias": getattr(base, "bias", None)}
    return {name: x.detach().to("cpu", copy=True) for name, x in found.items() if x is not None}
