"""Where a method's values of prompts come from: the choices of the axis `prompt_values`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class ReferenceRollouts(NamedTuple):
    """Settings of `reference_rollouts`."""

    num_samples: int
    min_solved: int


def reference_rollouts(*, num_samples: int = 8, min_solved: int = 0) -> ReferenceRollouts:
    """Rewards of completions by the policy that training starts from, sampled before it and kept.

    num_samples: completions a prompt; 0: as many as rollout.num_generations. min_solved: a prompt
    of which fewer passed is never trained on; 1 drops those that the policy never solves.
    """
    return ReferenceRollouts(num_samples, min_solved)


class GreedyCompletion(NamedTuple):
    """Settings of `greedy_completion`: there are none."""


class SuccessRates(NamedTuple):
    """Settings of `success_rates`."""

    num_samples: int
    half_life: float
    lowest: float
    highest: float
    exploration: float
    num_prompts: int


def greedy_completion() -> GreedyCompletion:
    """The reward of the policy's most likely completion of a prompt (ReMax, arXiv:2310.10505)."""
    return GreedyCompletion()


def success_rates(
    *, num_samples: int = 8, half_life: float = 0.06, lowest: float = 0.875, highest: float = 0.96,
    exploration: float = 0.05, num_prompts: int = 0,
) -> SuccessRates:  # fmt: skip
    """A running mean of every prompt's rewards, which also draws the prompts (arXiv:2509.13232).

    num_samples: completions a prompt by the policy that training starts from, for a start; 0: none.
    half_life: nats a token that the policy moves until half of what was known of a prompt is
    forgotten, at least 1 - highest and at most 1 - lowest of it at a time. exploration: added to
    sqrt(v (1 - v)), by which prompts are drawn. num_prompts: that may be asked; 0: all of a file,
    and as many as the run has prompts of a task without an end.
    """
    return SuccessRates(num_samples, half_life, lowest, highest, exploration, num_prompts)


PROMPT_VALUES: dict[str, Callable[..., Any]] = {
    "reference_rollouts": reference_rollouts,
    "greedy_completion": greedy_completion,
    "success_rates": success_rates,
}
"""Every source, by name."""
SOURCES = {"ref_rewards": "reference_rollouts", "baselines": "greedy_completion"}
"""The source of what a choice on another axis may ask for, where a method names none."""
