"""Learning-rate schedules by transformers' names, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from fastrl.config import OptimConfig
from fastrl.errors import InputError, nearest

STATEFUL = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
"""These follow the loss rather than the step."""

Schedule = Callable[[int], float]
"""From a step (from 0) to the factor of the peak step size."""


def make_schedule(config: OptimConfig, max_steps: int) -> Schedule:
    """The shape that transformers gives `lr_scheduler_type`, of `max_steps` steps in all.

    Where it would start at 0, step s of the warm-up has the rate that transformers gives s + 1, so
    that the first step moves; after the warm-up both agree. "constant" warms up too.
    """
    kind, arguments = config.lr_scheduler_type, config.lr_scheduler_kwargs
    known = [item.value for item in SchedulerType if item not in STATEFUL]
    if kind not in known:
        reason = "follows the loss, not the step" if kind in set(STATEFUL) else "is not known"
        raise InputError(f"optim.lr_scheduler_type {kind!r} {reason}; {nearest(kind, known)}")
    if kind == SchedulerType.CONSTANT:
        kind = SchedulerType.CONSTANT_WITH_WARMUP.value
    if kind == SchedulerType.CONSTANT_WITH_WARMUP and arguments:
        raise InputError(f"a constant rate takes no optim.lr_scheduler_kwargs, got {arguments}")
    warmup_steps = config.warmup_steps
    # transformers wants an optimizer for its peak step size alone.
    peak = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    try:
        shape = get_scheduler(kind, peak, warmup_steps, max_steps, dict(arguments)).lr_lambdas[0]
        values = [shape(step) for step in {0, min(warmup_steps, max_steps - 1), max_steps - 1}]
    except (TypeError, ValueError, ArithmeticError) as error:
        given = f"lr_scheduler_kwargs {arguments}, {warmup_steps} of {max_steps} steps warm-up"
        raise InputError(f"optim.lr_scheduler_type {kind} with {given}: {error}") from error
    if not all(math.isfinite(value) for value in values):
        raise InputError(f"optim.lr_scheduler_kwargs {arguments} of {kind} give no finite rate")
    warms_up_from_0 = warmup_steps > 0 and shape(0) == 0

    def factor(step: int) -> float:
        return float(shape(step + 1 if warms_up_from_0 and step < warmup_steps else step))

    return factor
