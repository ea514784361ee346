"""Rounds of sampling: scored completions of as many prompts as a step trains on.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.encoding import Tokenizer, decode_completions
from fastrl.rewards import Scorer
from fastrl.rollout import Engine, Sampling
from fastrl.types import Prompts, Rewards, Rollouts, StepMetrics


class Scored(NamedTuple):
    """Completions with their texts and rewards."""

    rollouts: Rollouts
    texts: list[str]  # none, as of rewards, where no prompt has all its completions yet
    rewards: Rewards


class Sampled(NamedTuple):
    """All that a step sampled, and the part of it that it trains on."""

    everything: Scored
    trained: Scored  # everything, where no prompt is worth training on: none of it has a gradient
    num_rounds: int
    num_missing: int  # prompts that the step has too few of
    carried: StepMetrics | None = None  # of partial rollouts: how old tokens are, how many go on

    @property
    def is_empty(self) -> bool:
        """Whether no prompt has all its completions yet, so that there is nothing to train on."""
        return not self.everything.texts

    @property
    def metrics(self) -> StepMetrics:
        """The cost of dynamic sampling."""
        return {
            "dynamic_sampling/rounds": float(self.num_rounds),
            "dynamic_sampling/sampled_prompts": float(len(self.everything.rollouts.prompts)),
            "dynamic_sampling/missing_prompts": float(self.num_missing),
        }

    @property
    def shortage(self) -> str | None:
        """What to tell the user where prompts are missing."""
        if not self.num_missing:
            return None
        sampled = len(self.everything.rollouts.prompts)
        kept = len(self.trained.rollouts.prompts)
        nothing = self.trained is self.everything
        found = "no prompt" if nothing else f"{kept} prompts instead of {kept + self.num_missing}"
        return (
            f"dynamic sampling: the selection kept {found} of {sampled} sampled in "
            f"{self.num_rounds} rounds; the step "
            f"{'is skipped' if nothing else 'trains on those'}. More rounds "
            "(objective.max_sampling_rounds) or prompts of medium difficulty help; later steps are "
            "counted in dynamic_sampling/missing_prompts"
        )


class Generated(NamedTuple):
    """Completions with their texts."""

    rollouts: Rollouts
    texts: list[str]


def generate_while_scoring(
    engine: Engine, scorer: Scorer, tokenizer: Tokenizer, prompts: Prompts, sampling: Sampling,
    generator: torch.Generator,
) -> Generated:  # fmt: skip
    """Completions, each submitted to the scorer from the moment it has ended."""
    num_generations = sampling.num_generations
    known: dict[int, str] = {}

    def ended(row: int, ids: Tensor) -> None:
        known[row] = decode_completions([ids], tokenizer)[0]
        example = prompts.examples[row // num_generations]
        scorer.submit(row, example, known[row], ids.tolist(), num_generations=num_generations)

    rollouts = engine.generate(prompts, sampling, generator, ended)
    if len(known) < len(rollouts.completion_ids):  # the engine says nothing of single ones
        return Generated(rollouts, decode_completions(rollouts.completion_ids, tokenizer))
    return Generated(rollouts, [known[row] for row in range(len(known))])


def sample_until_full(
    sample: Callable[[int, int], Scored], keeps: Callable[[Scored], Tensor], *, num_prompts: int,
    max_rounds: int,
) -> Sampled:  # fmt: skip
    """Sample until num_prompts prompts are kept, in at most max_rounds rounds.

    sample: of a number of prompts and the round, from 0. keeps: (P,) bool, the prompts of a round
    that are trained on. A round asks for as many prompts as will do if as many are kept as so far,
    but at most num_prompts; those over are not trained on.
    """
    rounds: list[Scored] = []
    kept: list[bool] = []
    num_next = num_prompts
    while True:
        rounds.append(sample(num_next, len(rounds)))
        kept += keeps(rounds[-1]).tolist()
        num_missing = num_prompts - sum(kept)
        if num_missing <= 0 or len(rounds) == max_rounds:
            break
        rate = max(sum(kept), 1) / len(kept)
        num_next = min(num_prompts, math.ceil(num_missing / rate))
    everything = joined(rounds)
    chosen = [p for p, is_kept in enumerate(kept) if is_kept][:num_prompts]
    trained = everything
    if 0 < len(chosen) < len(kept):
        trained = of_prompts(everything, chosen)
    return Sampled(everything, trained, len(rounds), max(num_missing, 0))


def joined(parts: Sequence[Scored]) -> Scored:
    """Several rounds as one, in their order."""
    if len(parts) == 1:
        return parts[0]
    rewards = [part.rewards for part in parts]
    return Scored(
        joined_rollouts([part.rollouts for part in parts]),
        list(chain.from_iterable(part.texts for part in parts)),
        Rewards(
            torch.cat([item.total for item in rewards]),
            {name: torch.cat([item.parts[name] for item in rewards]) for name in rewards[0].parts},
        ),
    )


def of_prompts(scored: Scored, chosen: Sequence[int]) -> Scored:
    """Some of the prompts with all their completions, in the order of the list."""
    rewards = scored.rewards
    rows = rows_of_prompts(chosen, scored.rollouts.num_generations)
    return Scored(
        rollouts_of_prompts(scored.rollouts, chosen),
        [scored.texts[row] for row in rows],
        Rewards(rewards.total[rows], {name: part[rows] for name, part in rewards.parts.items()}),
    )


def joined_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """The prompts of all parts with their completions, in their order."""
    return Rollouts(
        prompts=Prompts(
            tuple(chain.from_iterable(item.prompts.token_ids for item in parts)),
            tuple(chain.from_iterable(item.prompts.examples for item in parts)),
        ),
        completion_ids=tuple(chain.from_iterable(item.completion_ids for item in parts)),
        rollout_logps=_side_by_side(item.rollout_logps for item in parts),
        finished=torch.cat([item.finished for item in parts]),
        rollout_entropies=_side_by_side(item.rollout_entropies for item in parts),
        processed_logps=_side_by_side(item.processed_logps for item in parts),
        sampled=_side_by_side(item.sampled for item in parts),
        thinking_budgets=_in_a_row(item.thinking_budgets for item in parts),
    )


def rollouts_of_prompts(rollouts: Rollouts, chosen: Sequence[int]) -> Rollouts:
    """Some of the prompts with all their completions, in the order of the list."""
    rows = rows_of_prompts(chosen, rollouts.num_generations)

    def of_rows(values: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        return None if values is None else tuple(values[row] for row in rows)

    return Rollouts(
        prompts=Prompts(
            tuple(rollouts.prompts.token_ids[p] for p in chosen),
            tuple(rollouts.prompts.examples[p] for p in chosen),
        ),
        completion_ids=tuple(rollouts.completion_ids[row] for row in rows),
        rollout_logps=of_rows(rollouts.rollout_logps),
        finished=rollouts.finished[rows],
        rollout_entropies=of_rows(rollouts.rollout_entropies),
        processed_logps=of_rows(rollouts.processed_logps),
        sampled=of_rows(rollouts.sampled),
        thinking_budgets=None
        if rollouts.thinking_budgets is None
        else rollouts.thinking_budgets[rows],
    )


def rows_of_prompts(chosen: Sequence[int], num_generations: int) -> list[int]:
    """The rows b = p*G + g of some prompts."""
    return [p * num_generations + g for p in chosen for g in range(num_generations)]


def _side_by_side(values: Iterable[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
    """One tuple of all; None where the engine recorded none."""
    found = [value for value in values if value is not None]
    return tuple(chain.from_iterable(found)) if found else None


def _in_a_row(values: Iterable[Tensor | None]) -> Tensor | None:
    """One vector of all; None where there are none."""
    found = [value for value in values if value is not None]
    return torch.cat(found) if found else None
