"""AdamW in few bytes, and the way from backward passes to new weights."""

from fastrl.optim.gradients import clip_factor, gradient_norm
from fastrl.optim.lean import LeanAdamW
from fastrl.optim.make import check_optimizer, make_optimizer
from fastrl.optim.rates import parameter_groups, scale_learning_rate
from fastrl.optim.stepper import InBackward, StepOutcome, Stepper
from fastrl_kernels.adamw import join, split

__all__ = [
    "InBackward",
    "LeanAdamW",
    "StepOutcome",
    "Stepper",
    "check_optimizer",
    "clip_factor",
    "gradient_norm",
    "join",
    "make_optimizer",
    "parameter_groups",
    "scale_learning_rate",
    "split",
]
