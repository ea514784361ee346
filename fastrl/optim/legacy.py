"""What the trainer still calls."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastrl.config import OptimConfig
from fastrl.errors import NotFiniteError


def make_adamw(
    model: nn.Module, *, learning_rate: float, weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:  # fmt: skip
    """AdamW over the trainable parameters; only matrices are decayed (norms and biases are not)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, foreach=True)


def scheduled_learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Step size at step `step` (from 0) of `max_steps`: linear warm-up, then the shape."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return config.learning_rate * shape[config.lr_scheduler_type]


def clip_gradient(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale the gradient down to `max_norm`; returns its norm before, which must be finite."""
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    if not math.isfinite(norm):
        raise NotFiniteError("the gradient is not finite; lower the learning rate")
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this step size from the next optimizer step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
