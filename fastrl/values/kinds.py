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


PROMPT_VALUES: dict[str, Callable[..., Any]] = {"reference_rollouts": reference_rollouts}
"""Every source, by name."""
SOURCES = {"ref_rewards": "reference_rollouts"}
"""The source of what a choice on another axis may ask for, where a method names none."""
