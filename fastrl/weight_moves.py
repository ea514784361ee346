"""Moves of weights beside those of the optimizer: of the reference, and back to where a step began.

A rule's keywords are hyper-parameters of a method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def moving_average(step: int, *, mixup_alpha: float = 0.6, sync_steps: int = 512) -> float:
    """Every sync_steps steps the reference becomes mixup_alpha policy + (1 - mixup_alpha) reference
    (arXiv:2404.09656; names and numbers are TRL's).

    step: from 0, the one that has just been trained. Returns the policy's share, 0 for no move.
    """
    return mixup_alpha if (step + 1) % sync_steps == 0 else 0.0


def reset(step: int, *, sync_steps: int = 512) -> float:
    """Every sync_steps steps the reference becomes the policy (the hard update of the same)."""
    return moving_average(step, mixup_alpha=1.0, sync_steps=sync_steps)


def slow_fast(start: Tensor, end: Tensor, *, fast_steps: int = 3, way_back: float = 0.8) -> Tensor:
    """start + way_back (end - start), from which one more, slow, step is taken (SFPO,
    arXiv:2510.04072).

    start: weights before fast_steps iterations over the same completions; end: after them.
    way_back 0 is a step without fast ones.
    """
    return torch.lerp(start, end, way_back)


REFERENCE_UPDATES: dict[str, Callable[..., float]] = {
    "moving_average": moving_average,
    "reset": reset,
}
LOOK_AHEADS: dict[str, Callable[..., Tensor]] = {"slow_fast": slow_fast}


@torch.no_grad()
def reposition(weights: Sequence[Tensor], start: Sequence[Tensor], *, way_back: float) -> None:
    """Put weights, in place, where `slow_fast` says."""
    for weight, before in zip(weights, start, strict=True):
        weight.copy_(slow_fast(before, weight, way_back=way_back))
