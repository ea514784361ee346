"""A running estimate of how often each prompt is solved, which draws the prompts too (SPO).

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.loss import WORKSPACE_MB, token_statistics
from fastrl.methods.inputs import StepInputs
from fastrl.packing import pack_rollouts
from fastrl.policy import Policy
from fastrl.ragged import means
from fastrl.sampler import Scored
from fastrl.seeding import make_generator
from fastrl.types import Prompts, Rollouts, StepMetrics
from fastrl.values.fingerprint import value_keys
from fastrl.values.kinds import ReferenceRollouts, SuccessRates
from fastrl.values.reference import ReferenceValues, Stage
from fastrl.values.summary import OnBatch, ValueSummary


class Estimate(NamedTuple):
    """The mean of a Beta density, and how many rewards it stands for: alpha + beta."""

    rate: float
    weight: float


class TrackedRates:
    """The estimates of all prompts that may be asked; those that were, are in the checkpoint.

    `stream.tracked` has, by prompt: rate and weight, and the ids and logps of its last completion.
    """

    def __init__(self, stage: Stage, settings: SuccessRates, *, draws_more: bool) -> None:
        if draws_more:
            raise InputError(
                "dynamic_sampling and max_pass_rate choose prompts, and so does success_rates, by "
                "how often they are solved; set them off"
            )
        self.stage = stage
        self.settings = settings
        self.pool = _pool(stage, settings.num_prompts)
        self.reference: ReferenceValues | None = None
        if settings.num_samples:
            reference = ReferenceRollouts(settings.num_samples, min_solved=0)
            self.reference = ReferenceValues(stage, reference, draws_more=False, pool=self.pool)
        self.keys: list[str] = []
        """Of the different prompts of the pool, in its order."""
        self.indices: list[int] = []
        """Of the same."""
        self.baselines: dict[str, float] = {}
        """Of the prompts of the step: the rates before its rewards."""

    @property
    def is_ready(self) -> bool:
        """Whether the prompts are known."""
        return bool(self.keys)

    def prepare(self, on_batch: OnBatch | None = None) -> ValueSummary | None:
        """Where the estimates start: from completions by the policy that training starts from."""
        summary = None if self.reference is None else self.reference.prepare(on_batch)
        task = self.stage.task
        examples = [task.train_example(index) for index in self.pool]
        found: dict[str, int] = {}
        for index, key in zip(
            self.pool, value_keys(self.stage.encode(examples), task), strict=True
        ):
            found.setdefault(key, index)
        self.keys, self.indices = list(found), list(found.values())
        self.stage.stream.choose = self.choose
        return summary

    def choose(self, num_prompts: int, cursor: int) -> list[int]:
        """Indices of different prompts, likelier ones those whose success is uncertain.

        One after another, by sqrt(v (1 - v)) + exploration among those that are left: the largest
        of log weights with Gumbel noise. cursor: prompts that were drawn before.
        """
        if num_prompts > len(self.keys):
            raise InputError(
                f"a step asks {num_prompts} different prompts but there are {len(self.keys)}; "
                "lower prompts_per_step or raise num_prompts"
            )
        rates = torch.tensor([self.estimate(key).rate for key in self.keys], dtype=torch.float64)
        rates = rates.clamp(0.0, 1.0)
        weights = (rates * (1 - rates)).sqrt() + self.settings.exploration
        generator = make_generator(torch.device("cpu"), self.stage.config.seed, "prompts", cursor)
        uniform = torch.rand(len(weights), generator=generator, dtype=torch.float64)
        scores = weights.log() - (-uniform.log()).log()
        chosen = scores.argsort(descending=True, stable=True)[:num_prompts]
        return [self.indices[place] for place in chosen.tolist()]

    def estimate(self, key: str) -> Estimate:
        """As it is now."""
        if key in self.stage.stream.tracked:
            known = self.stage.stream.tracked[key]
            return Estimate(known["rate"], known["weight"])
        if self.reference is None:
            return Estimate(0.5, 1.0)
        assert self.reference.store is not None
        rewards = self.reference.store.rewards[key]
        rate = (math.fsum(rewards) + 0.5) / (len(rewards) + 1)
        return Estimate(rate, 1 / (1 - self.settings.lowest))

    def observe(self, scored: Scored, step: int) -> None:
        """Keep the rates as they were for the advantages, then take the rewards in."""
        rollouts = scored.rollouts
        if rollouts.rollout_logps is None:
            raise InputError(
                "success_rates compares log-probabilities of a prompt's last completion then and "
                "now, but the sampler gave none; choose another rollout.engine"
            )
        keys = value_keys(rollouts.prompts, self.stage.task)
        moved = self._drifts(rollouts.prompts, keys)
        rewards = scored.rewards.total.double().view(len(keys), -1)
        for p, key in enumerate(keys):
            before = self.estimate(key)
            self.baselines[key] = before.rate
            now = updated(before, rewards[p], moved.get(key, 0.0), self.settings)
            first = p * rollouts.num_generations
            self.stage.stream.tracked[key] = {
                **now._asdict(),
                "ids": rollouts.completion_ids[first].tolist(),
                "logps": rollouts.rollout_logps[first].tolist(),
            }

    def inputs(self, inputs: StepInputs, prompts: Prompts) -> StepInputs:
        """The step with the rates that were expected of its prompts."""
        found = [self.baselines[key] for key in value_keys(prompts, self.stage.task)]
        rates = torch.tensor(found, dtype=torch.float64)
        return dataclasses.replace(inputs, baselines=rates[inputs.groups])

    def metrics(self, prompts: Prompts) -> StepMetrics:
        """What was expected of the prompts of a step."""
        found = [self.baselines[key] for key in value_keys(prompts, self.stage.task)]
        return {"values/expected_reward": sum(found) / len(found)}

    def _drifts(self, prompts: Prompts, keys: list[str]) -> dict[str, float]:
        """Of each prompt that was asked before: how far its last completion's tokens moved."""
        tracked = self.stage.stream.tracked
        asked = [p for p, key in enumerate(keys) if key in tracked]
        if not asked:
            return {}
        last: list[dict[str, Any]] = [tracked[keys[p]] for p in asked]
        rollouts = Rollouts(
            prompts=Prompts(
                tuple(prompts.token_ids[p] for p in asked),
                tuple(prompts.examples[p] for p in asked),
            ),
            completion_ids=tuple(torch.tensor(one["ids"], dtype=torch.int64) for one in last),
            rollout_logps=tuple(torch.tensor(one["logps"]) for one in last),
            finished=torch.ones(len(asked), dtype=torch.bool),
        )
        config, recovery = self.stage.config, self.stage.recovery

        def attempt() -> Tensor:
            return drifts(
                self.stage.policy, rollouts, config.rollout.temperature,
                max_tokens_per_pass=recovery.max_tokens_per_pass, workspace_mb=config.workspace_mb,
            )  # fmt: skip

        found = recovery.redone(attempt, can_redo=lambda: True)
        return dict(zip((keys[p] for p in asked), found.tolist(), strict=True))


def updated(before: Estimate, rewards: Tensor, drift: float, settings: SuccessRates) -> Estimate:
    """The estimate after rewards (G,) of a policy that moved by `drift` nats a token.

    What was known counts rho = 2^(-drift / half_life) times as much, within [lowest, highest]:
    alpha and beta of the density are multiplied by it before r and 1 - r are added
    (arXiv:2509.13232). Any rewards will do: it is a running mean of them.
    """
    rho = min(max(2 ** (-drift / settings.half_life), settings.lowest), settings.highest)
    kept = rho * before.weight
    weight = kept + len(rewards)
    return Estimate((kept * before.rate + float(rewards.sum())) / weight, weight)


def drifts(
    policy: Policy, rollouts: Rollouts, temperature: float, *, max_tokens_per_pass: int,
    workspace_mb: float = WORKSPACE_MB,
) -> Tensor:  # fmt: skip
    """(B,) mean over a completion's tokens of |logp now - logp when it was sampled|, in nats."""
    assert rollouts.rollout_logps is not None
    num = len(rollouts.completion_ids)
    passes = pack_rollouts(
        rollouts, torch.ones(num, dtype=torch.bool), torch.ones(num), torch.ones(num),
        max_tokens_per_pass=max_tokens_per_pass, device=policy.device,
    )  # fmt: skip
    gaps, owners = [], []
    for item in passes:
        assert item.batch.rollout_logps is not None
        now = token_statistics(policy, item.plan, temperature, workspace_mb=workspace_mb).logps
        gaps.append((now.double() - item.batch.rollout_logps.double()).abs().cpu())
        owners.append(item.batch.completion_index.cpu())
    return means(torch.cat(gaps), torch.cat(owners), num)


def _pool(stage: Stage, num_prompts: int) -> range:
    """Indices of the prompts that may be asked: of a task without an end, the first ones."""
    first, size = stage.stream.first, stage.stream.epoch_size
    if size is not None:
        first -= first % size
        return range(first, first + min(size, num_prompts or size))
    usual = stage.config.max_steps * stage.config.prompts_per_step
    return range(first, first + (num_prompts or usual))
