"""One training step, from prompts to new weights.

Legend: P prompts, G num_generations, B = P*G completions, N packed tokens, S trained tokens, D
hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.activations import head_row_cost
from fastrl.config import Config
from fastrl.critic import check_critic, make_critic, value_metrics
from fastrl.down_sampling import weigh_tokens
from fastrl.encoding import encode_solution
from fastrl.learner import Learner
from fastrl.loss import check_workspace, token_statistics
from fastrl.memory.recovery import recovery_of
from fastrl.methods.adaptation import Adaptation
from fastrl.methods.estimates import kept_prompts, rows_to_train
from fastrl.methods.inputs import StepInputs, scheduled
from fastrl.methods.record import Method, training_parameter
from fastrl.metrics import (
    advantage_metrics,
    kl_metrics,
    packing_metrics,
    record_tokens,
    rollout_metrics,
    speed_metrics,
    token_metrics,
)
from fastrl.mini_batches import MiniBatch, cut, only
from fastrl.packing import PackedPass, pack_rollouts
from fastrl.phase_clock import PeakMemory, PhaseClock
from fastrl.phases import start_inputs, with_sampler_logps
from fastrl.policy import Policy
from fastrl.reference import Reference
from fastrl.rewards import Scorer
from fastrl.rewards.score import NotFiniteReward
from fastrl.sampler import Sampled, Scored
from fastrl.sampling_stage import SamplingStage
from fastrl.savings import down_sampling_metrics, row_flops
from fastrl.seeding import make_generator
from fastrl.selection import counted_lengths
from fastrl.step_output import StepOutput
from fastrl.tasks import Task
from fastrl.types import Example, Prompts, Rewards, Rollouts, StepMetrics
from fastrl.update import Updater
from fastrl.update_records import Packed, Update
from fastrl.weight_moves import REFERENCE_UPDATES
from fastrl_kernels.head import accumulation_dtype


class Trainer:
    """Holds what lives from step to step: the policy, its optimizer and the frozen reference."""

    def __init__(
        self, config: Config, policy: Policy, task: Task, scorer: Scorer, method: Method,
        reference: Reference | None = None,
    ) -> None:  # fmt: skip
        check_workspace(policy, config.workspace_mb)
        self.config = config
        self.policy = policy
        self.task = task
        self.method = method
        self.adaptation = Adaptation(method)
        self.last_sampled: Sampled | None = None
        self.reward_scale: Tensor | None = None
        """Standard deviation of all rewards so far, where the method divides by it."""
        self.reference = reference
        self.temperature = config.rollout.temperature
        self.head_row_cost = head_row_cost(
            policy.model.config,
            bf16=policy.is_half,
            is_checkpointed=config.model.gradient_checkpointing,
            has_bf16_stream=policy.has_bf16_stream,
            is_offloaded=config.model.activation_offloading,
            has_chunked_mlps=config.model.mlp_chunk_size > 0,
            head_dtype=policy.head_dtype,
        )
        self.recovery = recovery_of(config, self.head_row_cost, policy.device)
        self.sampler = SamplingStage(config, policy, task, scorer, method, self.recovery)
        self.row_flops = row_flops(policy.model)
        self.memory = PeakMemory(policy.device)
        self.critic, rate = None, 0.0
        if method.value_loss is not None:
            check_critic(config, method)
            self.critic = make_critic(config, policy)
            rate = training_parameter(method.value_loss, "critic_learning_rate")
        self.updater = Updater(
            config, policy, self.critic, self.recovery, critic_learning_rate=rate
        )

    @property
    def learner(self) -> Learner:
        """What a checkpoint has to keep beside the policy's weights."""
        return self.updater.learner

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the policy."""
        return self.learner.stepper.optimizer

    def train_step(self, step: int) -> StepOutput:
        """Step `step` (from 0): a function of weights, optimizer, seed, `step` and the stream."""
        self.recovery.begin()
        watch = PhaseClock(self.memory)
        sampled = self.sample(step, watch)
        self.last_sampled = sampled
        if sampled.is_empty:
            return StepOutput(self.skipped_metrics(step, sampled, watch), sampled)
        if self.sampler.not_finite is not None:
            return self._without_rewards(step, sampled, self.sampler.not_finite, watch)
        self.reward_scale = self.adaptation.see(sampled.trained.rewards.total)
        update = self._update(sampled.trained, step)
        watch.lap("train")
        self.adaptation.remember(self.method, update.inputs)
        self._move_reference(step)
        metrics = self.metrics(step, sampled, update, watch)
        num_completions = len(sampled.trained.rollouts.completion_ids)
        self.method = self.adaptation.update(self.method, metrics, num_completions)
        return StepOutput(metrics, sampled)

    def _update(self, trained: Scored, step: int) -> Update:
        """The optimizer steps of a step, begun anew with smaller passes where memory runs out.

        Once a weight has moved, `Updater` goes on from where it was.
        """
        learner = self.learner
        num_begun, num_skipped = learner.num_begun, learner.skipped_in_a_row

        def pack() -> Packed:  # what is drawn by chance is drawn again
            return self.pack(trained.rollouts, self.inputs(trained.rollouts, trained.rewards, step))

        def attempt() -> Update:
            is_exact = self.sampler.is_current
            return self.updater.update(pack(), step, sampler_is_exact=is_exact, repack=pack)

        def undo() -> None:
            learner.skipped_in_a_row = num_skipped

        return self.recovery.redone(
            attempt, can_redo=lambda: learner.num_begun == num_begun, undo=undo
        )

    def _without_rewards(
        self, step: int, sampled: Sampled, error: NotFiniteReward, watch: PhaseClock
    ) -> StepOutput:
        """A step that learns nothing, as one whose gradient is not finite; too many end the run."""
        self.learner.count_skipped(error)
        self._move_reference(step)
        metrics = self.skipped_metrics(step, sampled, watch)
        metrics |= {"skipped/non_finite": 1.0, "rewards/non_finite": float(error.num_scores)}
        return StepOutput(metrics, sampled, f"{error}; the step is left out")

    def _move_reference(self, step: int) -> None:
        """Let the reference follow the policy, where the method says so and when."""
        choice = self.method.reference_update
        if choice is None or self.reference is None:
            return
        share = REFERENCE_UPDATES[choice.name](step, **choice.parameters)
        if share:
            self.reference.update(self.policy, share)

    def sample(self, step: int, watch: PhaseClock) -> Sampled:
        """P prompts with scored completions, others for those that the selection leaves out."""

        def keeps(new: Scored) -> Tensor:
            if self.sampler.not_finite is not None:  # the step is lost: sample no more for it
                return torch.ones(len(new.rollouts.prompts), dtype=torch.bool)
            return kept_prompts(self.method, self.inputs(new.rollouts, new.rewards, step))

        is_dynamic = self.method.dynamic_sampling
        return self.sampler.sample(step, watch, keeps=keeps if is_dynamic else None)

    def encode(self, examples: Sequence[Example]) -> Prompts:
        """Examples as token ids under the run's limits."""
        return self.sampler.encode(examples)

    def encode_solution(self, example: Example) -> Tensor:
        """The reference answer as a completion within the run's limit."""
        limit = self.config.rollout.max_completion_length
        return encode_solution(example, self.policy.tokenizer, max_completion_length=limit)

    def inputs(self, rollouts: Rollouts, rewards: Rewards, step: int) -> StepInputs:
        """What the method may ask for before any token is looked at."""
        lengths = counted_lengths(
            rollouts, mask_truncated_completions=self.method.mask_truncated_completions
        )
        inputs = start_inputs(
            rollouts,
            rewards,
            lengths,
            max_completion_length=self.config.rollout.max_completion_length,
            progress=step / self.config.max_steps,
            generator=make_generator(torch.device("cpu"), self.config.seed, "method", step),
            reward_scale=self.reward_scale,
        )
        inputs = dataclasses.replace(inputs, past_squares=self.adaptation.past_squares)
        return self.sampler.with_values(inputs, rollouts)

    def pack(self, rollouts: Rollouts, inputs: StepInputs) -> Packed:
        """The rows that need work as packed passes, with the reference's log-probabilities if any.

        Where advantages come before tokens, they are in the passes, and rows whose gradient is
        zero by construction are not; where tokens come first, every counted row is there. A pass
        belongs to one mini-batch.
        """
        inputs, advantages, kept = rows_to_train(self.method, inputs)
        method, parts = self.method, []
        for rows in cut(inputs.groups, self.config.num_mini_batches):
            own = only(inputs, rows)
            weighted = weigh_tokens(
                self.method, rollouts, own, kept & rows,
                scores_from=self.method.scores_from, is_exact=self.sampler.is_current,
            )  # fmt: skip
            passes = pack_rollouts(
                rollouts,
                weighted.kept,
                advantages,
                weighted.weights,
                max_tokens_per_pass=self.recovery.max_tokens_per_pass,
                head_row_cost=self.head_row_cost,
                device=self.policy.device,
                dtype=accumulation_dtype(self.policy.head_dtype),
            )
            self.recovery.see(passes, self.head_row_cost)
            if self.method.ratio_to_sampler:
                passes = with_sampler_logps(passes)
            if self.reference is not None:
                passes = [self._with_ref_logps(item) for item in passes]
            method = weighted.method
            parts.append(MiniBatch(rows, own, passes))
        return Packed(method, inputs, parts)

    def _with_ref_logps(self, item: PackedPass) -> PackedPass:
        """The pass with log-probabilities under the reference, through the same plan."""
        assert self.reference is not None
        logps = token_statistics(
            self.reference, item.plan, self.temperature, workspace_mb=self.config.workspace_mb
        ).logps
        return PackedPass(item.plan, dataclasses.replace(item.batch, ref_logps=logps))

    def metrics(
        self, step: int, sampled: Sampled, update: Update, watch: PhaseClock
    ) -> StepMetrics:
        """Everything that is logged about the step; rewards and lengths are of all completions."""
        rollouts, rewards = sampled.everything.rollouts, sampled.everything.rewards
        threshold = self.config.eval.pass_threshold
        return {
            "loss": update.loss,
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
            **(sampled.metrics if self.method.dynamic_sampling else {}),
            **self.sampler.stream.metrics,
            **scheduled(self.method, step / self.config.max_steps),
            **rollout_metrics(rollouts, rewards, pass_threshold=threshold),
            **token_metrics(
                record_tokens(
                    update.passes if update.losses else (),
                    update.losses,
                    update.clipped,
                    update.advantages,
                )
            ),
            **advantage_metrics(update.inputs),
            **packing_metrics(update.passes),
            **down_sampling_metrics(
                sampled.trained.rollouts, update.passes, update.measured, row_flops=self.row_flops
            ),
            **self.sampler.reward_metrics,
            **kl_metrics(update.passes),
            **value_metrics(update.values),
            "skipped/non_finite": float(update.num_skipped),
            "rewards/non_finite": 0.0,
            **(update.sampler_gap or {}),
            **speed_metrics(watch, rollouts, update.passes),
            **self.recovery.metrics,
            **(sampled.carried or {}),
        }

    def skipped_metrics(self, step: int, sampled: Sampled, watch: PhaseClock) -> StepMetrics:
        """What is logged where no prompt has all its completions yet: weights stay as they are."""
        return {
            "loss": 0.0,
            "grad_norm": 0.0,
            "learning_rate": self.updater.set_learning_rates(self.method, step),
            **self.sampler.stream.metrics,
            **self.sampler.reward_metrics,
            **watch.metrics,
            **self.recovery.metrics,
            **(sampled.carried or {}),
        }
