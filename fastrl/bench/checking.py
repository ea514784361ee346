"""Whether every technique has the loss and the gradients of the first one, in this very run."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.bench.measuring import time_one
from fastrl.bench.techniques import Technique
from fastrl.bench.updates import Updates

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of the norm of a gradient's difference, relative to the gradient's, by what layers compute in:
in bfloat16 two orders of summation are a few hundredths apart."""


class Check(NamedTuple):
    """How far a technique is from the first one."""

    milliseconds: float
    """Of the call."""
    loss_error: float
    """Relative to the sum of |advantage| times weight over all tokens."""
    gradient_error: float
    """Norm of the difference of all gradients, relative to the norm of the first one's."""
    is_correct: bool


class Checker:
    """Remembers the loss and the gradients of the technique that it sees first, on the CPU."""

    def __init__(self, updates: Updates) -> None:
        self.updates = updates
        self.first: dict[str, Tensor] | None = None
        self.first_loss = 0.0
        compute = torch.bfloat16 if updates.policy.is_half else torch.float32
        self.tolerance = TOLERANCES[compute]

    def check(self, technique: Technique) -> Check:
        """Run once and compare."""
        self.updates.switch(technique)
        self.updates.release()
        step = self.updates.step(technique)
        losses: list[float] = []
        milliseconds = time_one(lambda: losses.append(step()), self.updates.policy.device)
        named = self.updates.policy.model.named_parameters()
        found = {name: x.grad for name, x in named if x.grad is not None}
        if self.first is None:
            self.first = {name: grad.cpu() for name, grad in found.items()}
            self.first_loss = losses[0]
        loss_error = abs(losses[0] - self.first_loss) / _scale(self.updates)
        gradient_error = _distance(found, self.first)
        self.updates.release()
        is_correct = loss_error <= self.tolerance and gradient_error <= self.tolerance
        return Check(milliseconds, loss_error, gradient_error, is_correct)


def _scale(updates: Updates) -> float:
    work = updates.work
    sums = torch.stack([row.double().sum() for row in work.weights])
    return max(float((sums * work.advantages.double().abs()).sum()), 1e-30)


def _distance(found: dict[str, Tensor], first: dict[str, Tensor]) -> float:
    """Infinite where other weights have gradients, or where there is none at all."""
    if found.keys() != first.keys():
        return math.inf
    difference = squares = 0.0
    for name, grad in found.items():
        other = first[name].to(grad.device).double()
        difference += float((grad.double() - other).square().sum())
        squares += float(other.square().sum())
    return math.sqrt(difference / squares) if squares > 0 else math.inf
