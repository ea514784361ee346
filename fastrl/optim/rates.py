"""Groups of parameters and their step sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The trainable parameters, each once; only matrices are decayed (norms and biases are not).

    learning_rate: the peak, which `scale_learning_rate` scales.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = {"lr": learning_rate, "peak_lr": learning_rate}
    return [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay, **rates},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0, **rates},
    ]


def scale_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """From the next step on every group uses its peak times `factor`; returns the first group's."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's compiled step reads it from memory
            group["lr"].fill_(group["peak_lr"] * factor)
        else:
            group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
