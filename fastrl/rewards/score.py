"""Scores of completions and their weighted total, in this process.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan

import torch

from fastrl.errors import InputError
from fastrl.rewards.load import Reward
from fastrl.tasks.prompt import prompt_start
from fastrl.types import Example, Rewards, Rollouts


def score_completions(
    rollouts: Rollouts, texts: Sequence[str], rewards: Sequence[Reward]
) -> Rewards:
    """Every reward of every completion, and their weighted sum in fp32.

    texts: the B decoded completions. A reward that does not apply to a completion is NaN in its
    part and adds nothing to the total. Nothing limits how long a reward takes: see RewardPool.
    """
    examples = examples_of(rollouts, texts)
    return _score(examples, texts, [ids.tolist() for ids in rollouts.completion_ids], rewards)


def check_rewards(rewards: Sequence[Reward], example: Example) -> None:
    """Score one example's reference answer, so that a broken reward fails before any training."""
    # One made-up token: a function may divide by the length of a completion, which is never 0.
    _score([example], [example.answer or ""], [[0]], rewards)


def examples_of(rollouts: Rollouts, texts: Sequence[str]) -> list[Example]:
    """The example of each of the B completions."""
    assert len(texts) == len(rollouts.completion_ids), "one text per completion"
    num_generations = rollouts.num_generations
    return [rollouts.prompts.examples[b // num_generations] for b in range(len(texts))]


def weighted_total(
    examples: Sequence[Example],
    scores: Mapping[str, Sequence[float | None]],
    weights: Sequence[float],
    *,
    failed: frozenset[int] = frozenset(),
) -> Rewards:
    """The parts and their weighted sum in fp32, in the order of the rewards.

    scores: of each reward, one value per completion, None where it has none. failed: completions of
    which a reward timed out or crashed; they total 0 where no other reward applies, which is an
    error elsewhere.
    """
    parts = {}
    total = torch.zeros(len(examples), dtype=torch.float32)  # (B,)
    applies = torch.zeros(len(examples), dtype=torch.bool)
    for (name, values), weight in zip(scores.items(), weights, strict=True):
        part = torch.tensor([nan if x is None else x for x in values], dtype=torch.float32)
        parts[name] = part
        total += weight * part.nan_to_num(nan=0.0)
        applies |= ~part.isnan()
    for b, (example, is_scored) in enumerate(zip(examples, applies.tolist(), strict=True)):
        if not is_scored and b not in failed:
            raise InputError(
                f"no reward applies to a completion of the prompt {prompt_start(example.prompt)}: "
                f"{', '.join(parts)} returned None; give the example an answer or add a reward "
                "that always applies"
            )
    return Rewards(total=total, parts=parts)


def _score(
    examples: Sequence[Example],
    texts: Sequence[str],
    completion_ids: Sequence[list[int]],
    rewards: Sequence[Reward],
) -> Rewards:
    scores = {reward.name: reward.function(examples, texts, completion_ids) for reward in rewards}
    return weighted_total(examples, scores, [reward.weight for reward in rewards])
