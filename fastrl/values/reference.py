"""Values of prompts from completions of the policy that training starts from (A*-PO, stage one).

They are sampled once, before training, and kept in `values_dir` for every run whose starting
weights, tokenizer, rewards and sampler are the same. A value is computed from the rewards when it
is needed, so that what it is computed with may change.

Legend: P prompts, N samples of a prompt, R = P*N.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.memory.recovery import Recovery
from fastrl.methods.inputs import StepInputs
from fastrl.policy import Policy
from fastrl.prompt_stream import PromptStream
from fastrl.replay import Recorded, Replay
from fastrl.rewards import Scorer
from fastrl.rollout import Engine, Sampling
from fastrl.sampler import Scored, generate_while_scoring
from fastrl.seeding import make_generator
from fastrl.tasks import Task
from fastrl.tasks.prompt import prompt_start
from fastrl.types import Example, Prompts, StepMetrics
from fastrl.values.fingerprint import fingerprint, value_keys
from fastrl.values.kinds import ReferenceRollouts
from fastrl.values.store import ValueStore
from fastrl.values.summary import OnBatch, ValueProgress, ValueSummary

PROMPTS_PER_BATCH = 128
"""Prompts that are sampled and written together: what a kill can lose."""
WINDOW = 1024
"""Prompts that are encoded together."""
HOPELESS = 4096
"""Prompts in a row that min_solved drops after which the rest is expected to be like them."""


class Stage(Protocol):
    """What is used of a run's sampling stage."""

    config: Config
    policy: Policy
    task: Task
    scorer: Scorer
    engine: Engine
    sampling: Sampling
    stream: PromptStream
    replay: Replay | None
    recorded: list[Recorded]
    greedy_rewards: Tensor | None
    recovery: Recovery

    def encode(self, examples: Sequence[Example]) -> Prompts: ...


class ReferenceValues:
    """Rewards of N reference completions of every prompt that the run meets."""

    def __init__(
        self, stage: Stage, settings: ReferenceRollouts, *, draws_more: bool,
        pool: range | None = None,
    ) -> None:  # fmt: skip
        """draws_more: steps may ask for more than prompts_per_step prompts. pool: indices of those
        that they may ask at all; None: the next ones of the task.
        """
        self.stage = stage
        self.pool = pool
        self.draws_more = draws_more
        num_samples = settings.num_samples or stage.config.rollout.num_generations
        if settings.min_solved > num_samples:
            raise InputError(
                f"min_solved must be at most the {num_samples} samples of a prompt, got "
                f"{settings.min_solved}"
            )
        if draws_more and stage.stream.epoch_size is None:
            raise InputError(
                "dynamic_sampling and max_pass_rate ask for prompts that cannot be known before a "
                "run on a task without an end, but the method compares with completions that are "
                "sampled before it; set them off, or train on a file"
            )
        self.min_solved = settings.min_solved
        self.sampling = dataclasses.replace(stage.sampling, num_generations=num_samples)
        self.store: ValueStore | None = None
        """None until `prepare` has been called."""

    @property
    def is_ready(self) -> bool:
        """Whether the rewards of all prompts of the run are known."""
        return self.store is not None

    def prepare(self, on_batch: OnBatch | None = None) -> ValueSummary:
        """Sample what is not known yet; the policy is the one that training starts from.

        on_batch: called after each batch is on disk; what it raises ends the stage, which goes on
        where it was when it is called again.
        """
        stage, started = self.stage, time.perf_counter()
        is_resumed = stage.stream.values_key is not None  # then the policy has been trained
        store = self._open()
        seen: set[str] = set()
        waiting: dict[str, tuple[Tensor, Example]] = {}
        num_sampled = num_failed = 0
        try:
            for prompts in chain(self._windows(store), [None]):
                if prompts is not None:
                    keys = value_keys(prompts, stage.task)
                    found = zip(prompts.token_ids, prompts.examples, strict=True)
                    new = {k: x for k, x in zip(keys, found, strict=True) if k not in store}
                    waiting |= new
                    seen.update(keys)
                if waiting and (is_resumed or stage.replay is not None):
                    example = next(iter(waiting.values()))[1]
                    raise _cannot_sample(store.directory, example, is_resumed=is_resumed)
                # Where values leave prompts out, those of a window say how many more are needed.
                needed = 1 if prompts is None or self.min_solved else PROMPTS_PER_BATCH
                while len(waiting) >= needed:
                    batch = list(waiting)[:PROMPTS_PER_BATCH]
                    num_failed += self._sample(store, {key: waiting.pop(key) for key in batch})
                    num_sampled += len(batch)
                    if on_batch is not None:
                        seconds = time.perf_counter() - started
                        on_batch(ValueProgress(num_sampled, len(store.rewards), seconds))
        finally:
            store.close()
        self.store = store
        stage.stream.values_key = store.directory.name
        stage.stream.leaves_out = self.leaves_out if self.min_solved else None
        rows = [store.rewards[key] for key in sorted(seen)]
        passed = [self._num_passed(row) for row in rows]
        return ValueSummary(
            directory=store.directory,
            num_prompts=len(rows),
            num_samples=store.num_samples,
            num_solved=sum(number > 0 for number in passed),
            num_dropped=sum(number < self.min_solved for number in passed),
            mean_reward=math.fsum(map(math.fsum, rows)) / (len(rows) * store.num_samples),
            num_sampled=num_sampled,
            num_failed=num_failed,
            num_torn=store.num_torn,
            seconds=time.perf_counter() - started,
        )

    def observe(self, scored: Scored, step: int) -> None:
        """Nothing: the reference does not change."""

    def leaves_out(self, example: Example) -> bool:
        """Whether the reference solved the prompt too rarely to train on it."""
        (row,) = self._rewards(self.stage.encode([example]))
        return self._num_passed(row) < self.min_solved

    def inputs(self, inputs: StepInputs, prompts: Prompts) -> StepInputs:
        """The step with the rewards (R,) of the reference completions of its prompts."""
        rows = torch.tensor(self._rewards(prompts), dtype=torch.float64)  # (P, N)
        owners = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
        return dataclasses.replace(inputs, ref_rewards=rows.flatten(), ref_groups=owners)

    def metrics(self, prompts: Prompts) -> StepMetrics:
        """What the reference thinks of the prompts of a step."""
        rows = torch.tensor(self._rewards(prompts), dtype=torch.float64)
        return {"values/reference_reward": float(rows.mean())}

    def _rewards(self, prompts: Prompts) -> list[tuple[float, ...]]:
        assert self.store is not None, "prepare comes first"
        found = []
        for key, example in zip(
            value_keys(prompts, self.stage.task), prompts.examples, strict=True
        ):
            if key not in self.store:
                raise InputError(
                    f"there are no rewards of reference completions for the prompt "
                    f"{prompt_start(example.prompt)} in {self.store.directory}; fastrl vstar with "
                    "the config of the run samples those of all prompts that it meets"
                )
            found.append(self.store.rewards[key])
        return found

    def _open(self) -> ValueStore:
        """The store of the policy as it is, or, once it has been trained, of what it was."""
        stage = self.stage
        key = stage.stream.values_key
        about: dict[str, Any] = {}
        if key is None:
            key, about = fingerprint(stage.policy, stage.config, self.sampling)
        directory = Path(stage.config.values_dir) / key
        return ValueStore(directory, self.sampling.num_generations, about)

    def _sample(self, store: ValueStore, batch: Mapping[str, tuple[Tensor, Example]]) -> int:
        """Sample, score and keep prompts by their keys; returns how many rewards failed."""
        stage = self.stage
        stage.recovery.begin()  # a batch is to itself what a step is
        prompts = Prompts(*zip(*batch.values(), strict=True))
        # The same generator for every batch: completions depend on their prompt and number alone,
        # not on the run's seed, so that other runs could have sampled them. An engine that seeds
        # rows by their place repeats its seeds under other prompts.
        generator = make_generator(stage.policy.device, 0, "values", store.directory.name)
        rollouts, texts = generate_while_scoring(
            stage.engine, stage.scorer, stage.policy.tokenizer, prompts, self.sampling, generator
        )
        rewards = stage.scorer.score(rollouts, texts).total
        store.add(list(batch), rewards.view(len(batch), -1))
        failed = (stage.scorer.metrics.get(f"rewards/{how}", 0) for how in ("timeouts", "crashes"))
        return int(sum(failed))

    def _num_passed(self, row: Sequence[float]) -> int:
        return sum(reward >= self.stage.config.eval.pass_threshold for reward in row)

    def _windows(self, store: ValueStore) -> Iterator[Prompts]:
        """The prompts that the run meets, in its order; all of a file, if it may meet them."""
        stage = self.stage
        wanted = stage.config.max_steps * stage.config.prompts_per_step
        first, size, pool = stage.stream.first, stage.stream.epoch_size, self.pool
        if size is not None and (wanted >= size or self.min_solved or self.draws_more):
            pool = pool or range(first - first % size, first - first % size + size)
        if pool is not None:
            for start in range(0, len(pool), WINDOW):
                yield self._encoded(pool[start : start + WINDOW])
            return
        num_usable = num_skipped = 0
        while num_usable < wanted:
            prompts = self._encoded(range(first, first + min(WINDOW, wanted - num_usable)))
            yield prompts
            first += len(prompts)
            num_kept = len(prompts)
            if self.min_solved:
                rows = [store.rewards[key] for key in value_keys(prompts, stage.task)]
                num_kept = sum(self._num_passed(row) >= self.min_solved for row in rows)
            num_usable += num_kept
            num_skipped = 0 if num_kept else num_skipped + len(prompts)
            if num_skipped >= HOPELESS:
                raise InputError(
                    f"none of {num_skipped} prompts in a row passed {self.min_solved} times in "
                    f"{store.num_samples} reference completions; lower min_solved, start from a "
                    "better policy, or with easier prompts"
                )

    def _encoded(self, indices: range) -> Prompts:
        return self.stage.encode([self.stage.task.train_example(index) for index in indices])


def _cannot_sample(directory: Path, example: Example, *, is_resumed: bool) -> InputError:
    why = "a replay samples nothing"
    if is_resumed:
        why = "the policy is no longer the one that the run began with"
    return InputError(
        f"the prompt {prompt_start(example.prompt)} has no rewards of reference completions in "
        f"{directory}, and {why}; run fastrl vstar with the run's config.toml and the same flags "
        f"first, then {'resume' if is_resumed else 'replay'}"
    )
