"""Supervised steps on the task's own solutions, so that there is something to reward."""

from __future__ import annotations

import dataclasses

import torch

from fastrl.aggregation import token_mean
from fastrl.config import Config
from fastrl.errors import NotFiniteError
from fastrl.integrations.schedules import make_schedule
from fastrl.learner import make_stepper
from fastrl.loss import supervised_pass_loss
from fastrl.optim import scale_learning_rate
from fastrl.packing import pack_rollouts
from fastrl.trainer import Trainer
from fastrl.types import Rollouts
from fastrl_kernels.head import accumulation_dtype


class WarmStart:
    """The supervised phase: the same packing and head as the policy loss, one solution a prompt."""

    def __init__(self, config: Config, trainer: Trainer) -> None:
        self.config = config
        self.trainer = trainer
        self.policy = trainer.policy
        steps = config.warm_start.steps
        optim = dataclasses.replace(
            config.optim, learning_rate=config.warm_start.learning_rate, weight_decay=0.0,
            adam_beta1=0.9, adam_beta2=0.999, max_grad_norm=1.0,
            lr_scheduler_type="cosine", lr_scheduler_kwargs={}, warmup_steps=steps // 10,
        )  # fmt: skip
        self.schedule = make_schedule(optim, steps)
        phase = dataclasses.replace(config, optim=optim)
        self.stepper = make_stepper(phase, self.policy.model, optim.learning_rate, name="policy")

    def train_step(self, step: int) -> float:
        """One optimizer step on fresh examples; returns the mean loss per token in nats."""
        recovery, num_begun = self.trainer.recovery, self.stepper.num_begun
        recovery.begin()
        scale_learning_rate(self.stepper.optimizer, self.schedule(step))
        return recovery.redone(
            lambda: self._train_step(step), can_redo=lambda: self.stepper.num_begun == num_begun
        )

    def _train_step(self, step: int) -> float:
        size = self.config.warm_start.batch_size
        examples = [self.trainer.task.train_example(step * size + i) for i in range(size)]
        solutions = Rollouts(
            prompts=self.trainer.encode(examples),
            completion_ids=tuple(map(self.trainer.encode_solution, examples)),
            rollout_logps=None,
            finished=torch.ones(size, dtype=torch.bool),
        )
        passes = pack_rollouts(
            solutions,
            kept=torch.ones(size, dtype=torch.bool),
            advantages=torch.ones(size),
            weights=token_mean(solutions.lengths),
            max_tokens_per_pass=self.trainer.recovery.max_tokens_per_pass,
            head_row_cost=self.trainer.head_row_cost,
            device=self.policy.device,
            dtype=accumulation_dtype(self.policy.head_dtype),
        )
        self.trainer.recovery.see(passes, self.trainer.head_row_cost)
        losses = [0.0] * len(passes)

        def backward(index: int) -> None:
            plan, batch = passes[index].plan, passes[index].batch
            hidden_states = self.policy.hidden_states(plan)
            loss = supervised_pass_loss(
                hidden_states, self.policy.lm_head, batch, workspace_mb=self.config.workspace_mb
            )
            loss.backward()
            losses[index] = float(loss.detach())

        outcome = self.stepper.step(len(passes), backward)
        if not outcome.is_applied:
            raise NotFiniteError("the warm start's gradient is not finite; lower its learning rate")
        return sum(losses)
