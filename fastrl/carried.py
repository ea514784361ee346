"""Partial rollouts: completions that a step's token budget cut, until their groups have ended.

Legend: P prompts, G num_generations, B = P*G completions, C max_completion_length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.methods.record import Method
from fastrl.rollout import Engine, OnCompletion, Sampling
from fastrl.rollout_tensors import from_tensors, to_tensors
from fastrl.sampler import joined_rollouts, rollouts_of_prompts, rows_of_prompts
from fastrl.tasks import Task
from fastrl.types import Prompts, Rollouts, StepMetrics


class ResumingEngine(Engine, Protocol):
    """An engine that can go on with completions, see `NativeEngine.advance`."""

    def advance(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator, *,
        started: Rollouts | None = None, max_tokens: int | None = None,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts: ...  # fmt: skip


@dataclass(frozen=True)
class InFlight:
    """Groups under way with what has been drawn of them, the oldest first."""

    rollouts: Rollouts
    indices: tuple[int, ...]  # P: of the prompts among the task's training examples
    drawn_at: tuple[Tensor, ...]  # B ragged int64: the step in which each token was drawn

    @property
    def num_prompts(self) -> int:
        """Groups."""
        return len(self.indices)

    def ended(self, max_completion_length: int) -> Tensor:
        """(P,) bool: all completions of the group are finished or of the largest length."""
        return has_ended(self.rollouts, max_completion_length).view(self.num_prompts, -1).all(1)

    def of_prompts(self, chosen: Sequence[int]) -> InFlight:
        """Some of the groups, in the order of the list, which must not be empty."""
        rows = rows_of_prompts(chosen, self.rollouts.num_generations)
        return InFlight(
            rollouts_of_prompts(self.rollouts, chosen),
            tuple(self.indices[p] for p in chosen),
            tuple(self.drawn_at[row] for row in rows),
        )

    def advanced(self, rollouts: Rollouts, step: int) -> InFlight:
        """The same groups with the tokens that were drawn in this step."""
        drawn_at = tuple(
            torch.cat([known, torch.full((len(ids) - len(known),), step)])
            for known, ids in zip(self.drawn_at, rollouts.completion_ids, strict=True)
        )
        return InFlight(rollouts, self.indices, drawn_at)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {
            **to_tensors(self.rollouts),
            "indices": torch.tensor(self.indices),
            "drawn_at": torch.cat(self.drawn_at),
        }


def in_flight_from(state: Mapping[str, Tensor], task: Task) -> InFlight:
    """The groups of a checkpoint; their examples are those of the task."""
    indices = tuple(state["indices"].tolist())
    rollouts = from_tensors(state, [task.train_example(index) for index in indices])
    return InFlight(rollouts, indices, state["drawn_at"].split(rollouts.lengths.tolist()))


def begun(prompts: Prompts, indices: Sequence[int], sampling: Sampling) -> InFlight:
    """Groups of which nothing has been drawn yet."""
    num_completions = len(prompts) * sampling.num_generations
    no_ids = (torch.zeros(0, dtype=torch.int64),) * num_completions
    no_values = (torch.zeros(0),) * num_completions
    no_flags = (torch.zeros(0, dtype=torch.bool),) * num_completions
    not_known = torch.full((num_completions,), -1)
    rollouts = Rollouts(
        prompts=prompts,
        completion_ids=no_ids,
        rollout_logps=no_values,
        finished=torch.zeros(num_completions, dtype=torch.bool),
        rollout_entropies=no_values,
        processed_logps=None if sampling.is_exact else no_values,
        sampled=None if sampling.thinking is None else no_flags,
        thinking_budgets=None if sampling.thinking is None else not_known,
    )
    return InFlight(rollouts, tuple(indices), no_ids)


def side_by_side(parts: Sequence[InFlight]) -> InFlight:
    """The groups of all parts in their order."""
    return InFlight(
        joined_rollouts([part.rollouts for part in parts]),
        tuple(index for part in parts for index in part.indices),
        tuple(steps for part in parts for steps in part.drawn_at),
    )


def has_ended(rollouts: Rollouts, max_completion_length: int) -> Tensor:
    """(B,) bool: the completion is finished or as long as one may be."""
    return rollouts.finished | (rollouts.lengths >= max_completion_length)


def advance(
    engine: ResumingEngine, flight: InFlight, sampling: Sampling, generator: torch.Generator, *,
    max_tokens: int,
) -> Rollouts:  # fmt: skip
    """What has been drawn of the groups after at most max_tokens more tokens."""
    open_rows = int((~has_ended(flight.rollouts, sampling.max_completion_length)).sum())
    assert max_tokens >= open_rows > 0, "check_partial_rollouts has seen to it"
    # An engine stops after the token of all rows that brings it to its limit.
    return engine.advance(
        flight.rollouts.prompts, sampling, generator, started=flight.rollouts,
        max_tokens=max_tokens - open_rows + 1,
    )  # fmt: skip


def staleness_metrics(
    trained: InFlight | None, carried: InFlight | None, sampling: Sampling, step: int
) -> StepMetrics:
    """Steps between the draw of a token and its training, and how many completions go on."""
    ages = torch.zeros(0, dtype=torch.int64)
    if trained is not None:
        ages = step - torch.cat(trained.drawn_at)
    num_carried = 0
    if carried is not None:
        open_rows = ~has_ended(carried.rollouts, sampling.max_completion_length)
        num_carried = int(open_rows.sum())
    return {
        "rollout/staleness_mean": float(ages.double().mean()) if len(ages) else 0.0,
        "rollout/staleness_max": float(ages.max()) if len(ages) else 0.0,
        "rollout/carried_completions": float(num_carried),
        "rollout/carried_prompts": float(0 if carried is None else carried.num_prompts),
        "rollout/step_skipped": float(trained is None),
    }


def check_partial_rollouts(config: Config, method: Method, engine: Engine) -> None:
    """Raise InputError where rollout.max_tokens_per_step does not suit the run."""
    budget = config.rollout.max_tokens_per_step
    if budget is None:
        return
    num_completions = config.prompts_per_step * config.rollout.num_generations
    if budget < num_completions:
        raise InputError(
            f"rollout.max_tokens_per_step must be at least {num_completions}, one token for each "
            f"of prompts_per_step * rollout.num_generations completions, got {budget}"
        )
    if not hasattr(engine, "advance"):
        raise InputError(
            "rollout.max_tokens_per_step needs an engine that can go on with completions, which "
            f"{config.rollout.engine!r} cannot; use rollout.engine 'native', or remove it"
        )
    if method.dynamic_sampling:
        raise InputError(
            "rollout.max_tokens_per_step and dynamic_sampling exclude each other: prompts that are "
            "replaced would not be known in the step; set objective.dynamic_sampling = false, or "
            "remove it"
        )
    if not corrects_sampler(method):
        raise InputError(
            "rollout.max_tokens_per_step trains on tokens of older policies, for which method "
            f"{method.name!r} does not correct; set objective.rollout_correction (for example "
            "truncated_tokens), or use a method with ratio_to_sampler, whose ratios are to the "
            "policy that sampled"
        )


def corrects_sampler(method: Method) -> bool:
    """Whether the loss knows the probabilities that tokens were drawn with."""
    return method.ratio_to_sampler or "rollout_correction" in method.choices
