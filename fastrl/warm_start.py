"""Supervised steps on the task's own solutions, so that there is something to reward."""

from __future__ import annotations

import torch

from fastrl.aggregation import token_mean
from fastrl.config import Config, OptimConfig
from fastrl.loss import supervised_pass_loss
from fastrl.optim import clip_gradient, make_adamw, scheduled_learning_rate, set_learning_rate
from fastrl.packing import pack_rollouts
from fastrl.trainer import Trainer
from fastrl.types import Rollouts


class WarmStart:
    """The supervised phase: the same packing and head as the policy loss, one solution a prompt."""

    def __init__(self, config: Config, trainer: Trainer) -> None:
        self.config = config
        self.trainer = trainer
        self.policy = trainer.policy
        self.schedule = OptimConfig(
            learning_rate=config.warm_start.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.warm_start.steps // 10,
        )
        self.optimizer = make_adamw(
            self.policy.model,
            learning_rate=config.warm_start.learning_rate,
            weight_decay=0.0,
        )

    def train_step(self, step: int) -> float:
        """One optimizer step on fresh examples; returns the mean loss per token in nats."""
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
            max_tokens_per_pass=self.config.max_tokens_per_pass,
            head_row_cost=self.trainer.head_row_cost,
            device=self.policy.device,
            dtype=self.policy.lm_head.weight.dtype,
        )
        set_learning_rate(
            self.optimizer,
            scheduled_learning_rate(self.schedule, step, self.config.warm_start.steps),
        )
        total = 0.0
        for item in passes:
            loss = supervised_pass_loss(
                self.policy.hidden_states(item.plan), self.policy.lm_head, item.batch
            )
            loss.backward()
            total += float(loss.detach())
        clip_gradient(self.policy.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total
