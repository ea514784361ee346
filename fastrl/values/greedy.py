"""What the policy's most likely completion of a prompt scores (ReMax)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastrl.methods.inputs import StepInputs
from fastrl.sampler import Scored, generate_while_scoring
from fastrl.seeding import make_generator
from fastrl.types import Prompts, StepMetrics
from fastrl.values.fingerprint import value_keys
from fastrl.values.reference import Stage
from fastrl.values.summary import OnBatch


class GreedyBaselines:
    """The rewards of one completion at temperature 0 of every prompt of the step."""

    is_ready = True

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.sampling = dataclasses.replace(stage.sampling, num_generations=1, temperature=0.0)
        self.rewards: dict[str, float] = {}
        self.step = -1
        """The step that they belong to: the policy's answers change with it."""

    def prepare(self, on_batch: OnBatch | None = None) -> None:
        """Nothing: a greedy completion is the current policy's."""

    def observe(self, scored: Scored, step: int) -> None:
        """Complete the prompts of a round once more, greedily."""
        stage, prompts = self.stage, scored.rollouts.prompts
        if step != self.step:
            self.rewards, self.step = {}, step
        rewards = stage.greedy_rewards = self._sampled(prompts, step)
        self.rewards |= dict(zip(value_keys(prompts, stage.task), rewards.tolist(), strict=True))

    def _sampled(self, prompts: Prompts, step: int) -> Tensor:
        """(P,) rewards of the prompts of a round, sampled or as they were recorded."""
        stage = self.stage
        if stage.replay is not None:
            return stage.replay.greedy_rewards(step, len(stage.recorded))
        generator = make_generator(stage.policy.device, stage.config.seed, "greedy", step)
        rollouts, texts = generate_while_scoring(
            stage.engine, stage.scorer, stage.policy.tokenizer, prompts, self.sampling, generator
        )
        return stage.scorer.score(rollouts, texts).total

    def inputs(self, inputs: StepInputs, prompts: Prompts) -> StepInputs:
        """The step with the greedy reward of its prompt for every completion."""
        found = torch.tensor(self._of(prompts), dtype=torch.float64)  # (P,)
        return dataclasses.replace(inputs, baselines=found[inputs.groups])

    def metrics(self, prompts: Prompts) -> StepMetrics:
        """How well the policy does without chance."""
        found = self._of(prompts)
        return {"values/greedy_reward": sum(found) / len(found)}

    def _of(self, prompts: Prompts) -> list[float]:
        return [self.rewards[key] for key in value_keys(prompts, self.stage.task)]
