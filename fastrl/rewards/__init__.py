"""Rewards: scores of completions, from a task's verifier, a built-in or a user's function.

Names are loaded when first used: processes that only call rewards do without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrl.rewards.load import BUILT_IN as BUILT_IN
    from fastrl.rewards.load import Reward as Reward
    from fastrl.rewards.load import exact_reward as exact_reward
    from fastrl.rewards.load import load_rewards as load_rewards
    from fastrl.rewards.pool import RewardPool as RewardPool
    from fastrl.rewards.score import check_rewards as check_rewards
    from fastrl.rewards.score import score_completions as score_completions
    from fastrl.rewards.scorer import LocalScorer as LocalScorer
    from fastrl.rewards.scorer import Scorer as Scorer

_HOMES = {
    "BUILT_IN": "fastrl.rewards.load",
    "LocalScorer": "fastrl.rewards.scorer",
    "Scorer": "fastrl.rewards.scorer",
    "Reward": "fastrl.rewards.load",
    "RewardPool": "fastrl.rewards.pool",
    "check_rewards": "fastrl.rewards.score",
    "exact_reward": "fastrl.rewards.load",
    "load_rewards": "fastrl.rewards.load",
    "score_completions": "fastrl.rewards.score",
}

__all__ = [
    "BUILT_IN",
    "LocalScorer",
    "Reward",
    "RewardPool",
    "Scorer",
    "check_rewards",
    "exact_reward",
    "load_rewards",
    "score_completions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastrl.rewards' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
