"""The norm of a gradient, and what it is scaled by to stay below a bound."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

PIECE = 1 << 16


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """2-norm of all of them together, in float32; 0 for none, not finite where one is not.

    Takes the norm of each first: the bits of torch.nn.utils.clip_grad_norm_ for float32.
    """
    norms = [norm_of(gradient) for gradient in gradients]
    return total_norm(norms)


def norm_of(gradient: Tensor) -> Tensor:
    """2-norm of one tensor, a float32 scalar. On a CPU bfloat16 is looked at in pieces: torch would
    make a float32 copy of it.
    """
    if gradient.dtype == torch.float32 or gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    pieces = gradient.reshape(-1).split(PIECE)
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces]
    return torch.linalg.vector_norm(torch.stack(norms))


def total_norm(norms: list[Tensor]) -> float:
    """The norm of tensors whose norms are given."""
    if not norms:
        return 0.0
    device = norms[0].device
    return float(torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms])))


def clip_factor(norm: float, max_norm: float) -> float:
    """What scales a gradient of this norm down to `max_norm`, at most 1; as torch computes it."""
    factor = max_norm / (torch.tensor(norm, dtype=torch.float32) + 1e-6)
    return float(factor.clamp(max=1.0))
