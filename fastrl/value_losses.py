"""What a value model is trained on: losses of its values against their targets.

Legend: S trained tokens. A loss is a function of values, old_values and value_targets, (S,) each,
to the loss of each token, and has gradients with respect to values alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def clipped_squared_error(
    values: Tensor, old_values: Tensor, value_targets: Tensor, *, epsilon_value: float = 0.2
) -> Tensor:
    """(V - target)^2 / 2, or that of V within +-epsilon_value of the old value if it is larger
    (PPO, arXiv:1707.06347).

    A value that has moved so far towards its target, or beyond it, has no gradient any more.
    """
    near = old_values + (values - old_values).clamp(-epsilon_value, epsilon_value)
    errors = torch.maximum((values - value_targets).square(), (near - value_targets).square())
    return errors / 2


def squared_error(values: Tensor, old_values: Tensor, value_targets: Tensor) -> Tensor:
    """(V - target)^2 / 2."""
    return (values - value_targets).square() / 2


def huber_error(
    values: Tensor, old_values: Tensor, value_targets: Tensor, *, delta: float = 10.0
) -> Tensor:
    """(V - target)^2 / 2, which goes on as a line of slope delta beyond delta (POAD)."""
    return functional.huber_loss(values, value_targets, reduction="none", delta=delta)


VALUE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "clipped_squared_error": clipped_squared_error,
    "squared_error": squared_error,
    "huber_error": huber_error,
}
TRAINING: dict[str, float] = {
    "value_coef": 1.0,
    "value_lambda": 1.0,
    "critic_warmup_steps": 0,
    "critic_learning_rate": 0.0,
}
"""What every value loss has beside its own: its weight; the lambda of the targets, which at 1 are
returns; the first steps of a run, in which the value model is trained alone; and the peak step size
of the value model's own weights, which at 0 is the policy's."""
