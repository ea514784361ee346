"""Completions that somebody else's engine has drawn, as rollouts.

Legend: B completions, C completion length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.errors import InputError, NotFiniteError
from fastrl.policy import Policy
from fastrl.rollout import Sampling
from fastrl.rollout.stopping import stop_strings_of
from fastrl.types import Prompts, Rollouts


class Completion(NamedTuple):
    """One completion up to where it ended."""

    ids: Tensor  # (C,) int64, the end-of-sequence token included
    logps: Tensor | None  # (C,) fp32
    finished: bool  # not cut by the length limit


class Ends:
    """Where completions of a policy end."""

    def __init__(self, policy: Policy, sampling: Sampling) -> None:
        self._tokens = torch.tensor(policy.eos_token_ids)
        self._stops = stop_strings_of(policy.tokenizer, sampling.stop_strings)

    def cut(self, ids: Tensor, logps: Tensor | None) -> Completion:
        """The completion up to its first end, or all of it where there is none."""
        ended = torch.isin(ids, self._tokens)
        if self._stops is not None and len(ids) > 0:
            lengths = torch.arange(1, len(ids) + 1)
            ended |= self._stops.ended(ids.expand(len(ids), -1), lengths)
        finished = bool(ended.any())
        length = int(ended.int().argmax()) + 1 if finished else len(ids)
        return Completion(ids[:length], None if logps is None else logps[:length], finished)


def to_rollouts(
    prompts: Prompts, sampling: Sampling, completions: Sequence[Completion], *, is_processed: bool
) -> Rollouts:
    """Rollouts of the completions in row order, their log-probabilities where they belong.

    is_processed: they are of the distribution that was drawn from, after temperature and
    truncation; of softmax(logits) otherwise. At temperature 0 both are of softmax(logits).
    """
    logps = _all_logps(completions)
    rollout_logps = processed_logps = None
    if logps is not None:
        is_certain = sampling.temperature == 0.0
        if is_certain or not is_processed or sampling.is_exact:
            rollout_logps = logps
        if is_certain:
            processed_logps = tuple(torch.zeros_like(values) for values in logps)
        elif is_processed and not sampling.is_exact:
            processed_logps = logps
    return Rollouts(
        prompts=prompts,
        completion_ids=tuple(completion.ids for completion in completions),
        rollout_logps=rollout_logps,
        finished=torch.tensor([completion.finished for completion in completions]),
        processed_logps=processed_logps,
    )


def _all_logps(completions: Sequence[Completion]) -> tuple[Tensor, ...] | None:
    if any(completion.logps is None for completion in completions):
        return None
    logps = tuple(completion.logps for completion in completions if completion.logps is not None)
    if not all(torch.isfinite(values).all() for values in logps):
        raise NotFiniteError("the model's logits are not finite; lower the learning rate")
    return logps


def refuse_unless_raw_is_enough(sampling: Sampling, engine: str) -> None:
    """log-probabilities of softmax(logits) say nothing about those at another temperature."""
    if sampling.temperature not in (0.0, 1.0):
        raise InputError(
            f"{engine} records log-probabilities of softmax(logits), so rollout.temperature must "
            f"be 1, got {sampling.temperature}; or let it record those of what it draws from"
        )
