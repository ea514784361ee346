"""Trainers in float64, whose updates can be compared with formulas."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.optim import StepOutcome, Stepper
from tests.helpers import with_float64_norms


class ExactStepper(Stepper):
    """torch's own clipping and AdamW, in the dtype of the parameters."""

    def _step_all(self) -> StepOutcome:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), self.max_grad_norm)
        if not bool(norm.isfinite()):
            return StepOutcome(float(norm), is_applied=False)
        self.optimizer.step()
        return StepOutcome(float(norm), is_applied=True)


def exact_stepper(module: torch.nn.Module, *, learning_rate: float) -> ExactStepper:
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["peak_lr"] = learning_rate
    return ExactStepper(optimizer, max_grad_norm=1.0)


def make_exact(trainer: Any, *, learning_rate: float) -> None:
    """Turn a trainer's policy, its value model and their optimizers to float64, in place."""
    model = with_float64_norms(trainer.policy.model.double())
    learner = trainer.updater.learner
    learner.stepper = exact_stepper(model, learning_rate=learning_rate)
    if learner.critic is not None:
        learner.critic.trained.double()
        learner.critic_stepper = exact_stepper(learner.critic.trained, learning_rate=learning_rate)
