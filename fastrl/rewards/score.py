"""Scores of completions and their weighted total, in this process.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, nan

import torch

from fastrl.errors import InputError
from fastrl.rewards.load import Reward
from fastrl.tasks.prompt import prompt_start
from fastrl.types import Example, Rewards, Rollouts

LARGEST = torch.finfo(torch.float32).max


class NotFiniteReward(InputError):
    """A score that is NaN, infinite or too large for float32: completions without a reward."""

    def __init__(self, message: str, rewards: Rewards, num_scores: int) -> None:
        """rewards: infinite in the parts where a score is not finite, without it in the total."""
        super().__init__(message)
        self.rewards = rewards
        self.num_scores = num_scores
        """Scores that are not finite."""


def score_completions(
    rollouts: Rollouts, texts: Sequence[str], rewards: Sequence[Reward]
) -> Rewards:
    """Every reward of every completion, and their weighted sum in fp32.

    texts: the B decoded completions. A reward that does not apply to a completion is NaN in its
    part and adds nothing to the total. Raises NotFiniteReward where a score is no finite number:
    only None says that a reward does not apply. Nothing limits how long one takes: see RewardPool.
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
    error elsewhere. Raises NotFiniteReward, which has the others, where a score is not finite.
    """
    parts = {}
    total = torch.zeros(len(examples), dtype=torch.float32)  # (B,)
    applies = torch.zeros(len(examples), dtype=torch.bool)
    problems: list[str] = []
    for (name, values), weight in zip(scores.items(), weights, strict=True):
        # So that no sum of them is infinite either.
        largest = LARGEST / max(1.0, 2 * len(scores) * abs(weight))
        part = torch.tensor([_finite_or_inf(x, largest) for x in values], dtype=torch.float32)
        parts[name] = part
        total += weight * part.nan_to_num(nan=0.0, posinf=0.0)
        applies |= ~part.isnan()
        problems += [
            f"the reward {name!r} gave {values[b]} for a completion of the prompt "
            f"{prompt_start(examples[b].prompt)}"
            for b in part.isinf().nonzero()[:, 0].tolist()
        ]
    for b, (example, is_scored) in enumerate(zip(examples, applies.tolist(), strict=True)):
        if not is_scored and b not in failed:
            raise InputError(
                f"no reward applies to a completion of the prompt {prompt_start(example.prompt)}: "
                f"{', '.join(parts)} returned None; give the example an answer or add a reward "
                "that always applies"
            )
    rewards = Rewards(total=total, parts=parts)
    if problems:
        more = f", and {len(problems) - 1} more are no finite numbers" if problems[1:] else ""
        raise NotFiniteReward(problems[0] + more, rewards, len(problems))
    return rewards


def checked(rewards: Rewards) -> Rewards:
    """What was recorded; raises NotFiniteReward again where a score was not finite."""
    num_scores = sum(int(part.isinf().sum()) for part in rewards.parts.values())
    if num_scores:
        raise NotFiniteReward(
            f"{num_scores} recorded scores are no finite numbers", rewards, num_scores
        )
    return rewards


def _finite_or_inf(value: float | None, largest: float) -> float:
    """NaN for None, infinity for what is NaN or larger than `largest`."""
    if value is None:
        return nan
    return value if abs(value) <= largest else inf


def _score(
    examples: Sequence[Example],
    texts: Sequence[str],
    completion_ids: Sequence[list[int]],
    rewards: Sequence[Reward],
) -> Rewards:
    scores = {reward.name: reward.function(examples, texts, completion_ids) for reward in rewards}
    return weighted_total(examples, scores, [reward.weight for reward in rewards])
