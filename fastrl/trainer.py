"""One training step, from prompts to new weights.

Legend: P prompts, G num_generations, B = P*G completions, N packed tokens, S trained tokens, D
hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.activations import head_row_cost
from fastrl.config import Config
from fastrl.encoding import decode_completions, encode_prompts, encode_solution
from fastrl.loss import policy_pass_loss
from fastrl.methods.adaptation import Adaptation
from fastrl.methods.coefficients import completion_weights
from fastrl.methods.estimates import rows_to_train
from fastrl.methods.inputs import StepInputs
from fastrl.methods.record import Method
from fastrl.metrics import (
    GIB,
    Stopwatch,
    advantage_metrics,
    packing_metrics,
    peak_memory_bytes,
    record_tokens,
    rollout_metrics,
    speed_metrics,
    token_metrics,
)
from fastrl.optim import clip_gradient, make_adamw, scheduled_learning_rate, set_learning_rate
from fastrl.packing import PackedPass, pack_rollouts
from fastrl.phases import (
    Prepared,
    prepare,
    start_inputs,
    step_loss,
    with_old_logps,
    with_sampler_logps,
)
from fastrl.policy import Policy
from fastrl.rewards import Reward, score_completions
from fastrl.rollout import Sampling, make_engine
from fastrl.seeding import make_generator
from fastrl.selection import counted_lengths
from fastrl.tasks import Task
from fastrl.types import Example, Prompts, Rewards, Rollouts, StepMetrics
from fastrl_kernels import LinearLogps, PolicyLoss, linear_logps
from fastrl_kernels.head import accumulation_dtype


@dataclass(frozen=True)
class StepOutput:
    """What one step did, for the logs."""

    metrics: StepMetrics
    rollouts: Rollouts
    texts: list[str]
    rewards: Rewards


class Update(NamedTuple):
    """What the optimizer did with a step: its last iteration, pass by pass."""

    learning_rate: float
    grad_norm: float
    passes: tuple[PackedPass, ...]
    losses: tuple[PolicyLoss, ...]
    inputs: StepInputs
    loss: float = 0.0
    clipped: tuple[Tensor | None, ...] = ()


class Trainer:
    """Holds what lives from step to step: the policy, its optimizer and the frozen reference."""

    def __init__(
        self, config: Config, policy: Policy, task: Task, rewards: Sequence[Reward],
        method: Method, reference: Policy | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.policy = policy
        self.task = task
        self.rewards = tuple(rewards)
        self.method = method
        self.adaptation = Adaptation(method)
        self.reference = reference
        self.engine = make_engine(config.rollout.engine, policy)
        self.sampling = Sampling(
            num_generations=config.rollout.num_generations,
            max_completion_length=config.rollout.max_completion_length,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            min_p=config.rollout.min_p,
        )
        self.head_row_cost = head_row_cost(
            policy.model.config,
            bf16=policy.bf16,
            is_checkpointed=config.model.gradient_checkpointing,
        )
        self.optimizer = make_adamw(
            policy.model,
            learning_rate=config.optim.learning_rate,
            weight_decay=config.optim.weight_decay,
            betas=(config.optim.adam_beta1, config.optim.adam_beta2),
        )

    def train_step(self, step: int) -> StepOutput:
        """Step `step` (from 0): a function of weights, optimizer state, seed and `step`."""
        watch = Stopwatch()
        prompts = self.prompts(step)
        rollouts = self.rollouts(prompts, step)
        watch.lap("rollout")
        texts = decode_completions(rollouts.completion_ids, self.policy.tokenizer)
        rewards = score_completions(rollouts, texts, self.rewards)
        watch.lap("score")
        inputs = self.inputs(rollouts, rewards, step)
        inputs, passes = self.pack(rollouts, inputs)
        update = self.update(rollouts, inputs, passes, step)
        watch.lap("train")
        metrics = self.metrics(step, rollouts, rewards, update, watch)
        num_completions = len(rollouts.completion_ids)
        self.method = self.adaptation.update(self.method, metrics, num_completions)
        return StepOutput(metrics, rollouts, texts, rewards)

    def prompts(self, step: int) -> Prompts:
        """P prompts; a cursor that is a function of the step, behind those of the warm start."""
        P = self.config.prompts_per_step
        first = self.config.warm_start.steps * self.config.warm_start.batch_size + step * P
        return self.encode([self.task.train_example(first + i) for i in range(P)])

    def encode(self, examples: Sequence[Example]) -> Prompts:
        """Examples as token ids under the run's limits."""
        return encode_prompts(
            examples,
            self.policy.tokenizer,
            max_prompt_length=self.config.rollout.max_prompt_length,
            chat_template=self.config.data.chat_template,
        )

    def encode_solution(self, example: Example) -> Tensor:
        """The reference answer as a completion within the run's limit."""
        limit = self.config.rollout.max_completion_length
        return encode_solution(example, self.policy.tokenizer, max_completion_length=limit)

    def rollouts(self, prompts: Prompts, step: int) -> Rollouts:
        """G completions of every prompt from the current weights."""
        generator = make_generator(self.policy.device, self.config.seed, "rollout", step)
        return self.engine.generate(prompts, self.sampling, generator)

    def inputs(self, rollouts: Rollouts, rewards: Rewards, step: int) -> StepInputs:
        """What the method may ask for before any token is looked at."""
        lengths = counted_lengths(
            rollouts, mask_truncated_completions=self.method.mask_truncated_completions
        )
        return start_inputs(
            rollouts,
            rewards,
            lengths,
            max_completion_length=self.sampling.max_completion_length,
            progress=step / self.config.max_steps,
            generator=make_generator(torch.device("cpu"), self.config.seed, "method", step),
        )

    def pack(self, rollouts: Rollouts, inputs: StepInputs) -> tuple[StepInputs, list[PackedPass]]:
        """The rows that need work as packed passes, with the reference's log-probabilities if any.

        Where advantages come before tokens, they are in the passes, and rows whose gradient is
        zero by construction are not; where tokens come first, every counted row is there.
        """
        inputs, advantages, kept = rows_to_train(self.method, inputs)
        passes = pack_rollouts(
            rollouts,
            kept,
            advantages,
            completion_weights(self.method, inputs),
            max_tokens_per_pass=self.config.max_tokens_per_pass,
            head_row_cost=self.head_row_cost,
            device=self.policy.device,
            dtype=accumulation_dtype(self.policy.lm_head.weight.dtype),
        )
        if self.method.ratio_to_sampler:
            passes = with_sampler_logps(rollouts, passes)
        if self.reference is not None:
            passes = [self._with_ref_logps(item) for item in passes]
        return inputs, passes

    def update(
        self, rollouts: Rollouts, inputs: StepInputs, passes: Sequence[PackedPass], step: int
    ) -> Update:
        """`num_iterations` optimizer steps; none if there is no row to learn from."""
        learning_rate = scheduled_learning_rate(self.config.optim, step, self.config.max_steps)
        set_learning_rate(self.optimizer, learning_rate)
        result = Update(learning_rate, 0.0, tuple(passes), (), inputs)
        for iteration in range(self.config.objective.num_iterations if passes else 0):
            inputs, ready = prepare(
                self.method, rollouts, inputs, passes, self._policy_statistics,
                is_first=iteration == 0,
            )  # fmt: skip
            losses = self._backward(ready)
            passes = with_old_logps(ready.passes, losses)
            result = Update(
                learning_rate, self._optimizer_step(), tuple(passes), tuple(losses), inputs,
                step_loss(ready, losses), tuple(item.clipped for item in ready.coefficients),
            )  # fmt: skip
        return result

    @torch.no_grad()
    def _statistics(self, policy: Policy, item: PackedPass) -> LinearLogps:
        """Log-probabilities and entropies of a pass under a policy, without gradient."""
        return linear_logps(
            policy.hidden_states(item.plan)[item.plan.source_index],
            policy.lm_head,
            item.plan.target_ids,
            temperature=self.sampling.temperature,
        )

    def _policy_statistics(self, item: PackedPass) -> LinearLogps:
        return self._statistics(self.policy, item)

    def _with_ref_logps(self, item: PackedPass) -> PackedPass:
        """The pass with log-probabilities under the reference, through the same plan."""
        assert self.reference is not None
        logps = self._statistics(self.reference, item).logps
        return PackedPass(item.plan, dataclasses.replace(item.batch, ref_logps=logps))

    def _backward(self, ready: Prepared) -> list[PolicyLoss]:
        """Accumulate the gradient of the whole step, one pass in memory at a time."""
        losses = []
        for item, constants in zip(ready.passes, ready.coefficients, strict=True):
            loss = policy_pass_loss(
                self.policy.hidden_states(item.plan),
                self.policy.lm_head,
                item.batch,
                objective=constants.objective,
                temperature=self.sampling.temperature,
                entropy_coef=constants.entropy_coef,
            )
            loss.loss.backward()
            losses.append(loss._replace(loss=loss.loss.detach()))
        return losses

    def _optimizer_step(self) -> float:
        """Clip, step and clear the gradient; returns its norm before clipping."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = clip_gradient(parameters, self.config.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def metrics(
        self, step: int, rollouts: Rollouts, rewards: Rewards, update: Update, watch: Stopwatch
    ) -> StepMetrics:
        """Everything that is logged about the step."""
        threshold = self.config.eval.pass_threshold
        return {
            "loss": update.loss,
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
            **rollout_metrics(rollouts, rewards, pass_threshold=threshold),
            **token_metrics(
                record_tokens(
                    rollouts, update.passes, update.losses, update.clipped, update.inputs.advantages
                )
            ),
            **advantage_metrics(update.inputs),
            **packing_metrics(update.passes),
            **speed_metrics(watch, rollouts, update.passes),
            "memory/peak_gib": peak_memory_bytes(self.policy.device) / GIB,
        }
