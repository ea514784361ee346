"""What becomes of the rewards before advantages are formed, as tables of rules.

Legend: B completions, S trained tokens, R separate rewards. The rules of REWARD_SHAPINGS map
rewards (B,), or reward_parts (R, B), and what else they name to rewards (B,) of the same dtype;
those of TOKEN_REWARD_SHAPINGS map token_rewards (S,) likewise.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastrl.reward_shaping.divergences import (
    chi_squared_penalised,
    constrained,
    kl_penalised,
    kl_penalised_tokens,
    preference_tokens,
    root_chi_squared_penalised,
    teacher_penalised_tokens,
    whitened_kl_penalised_tokens,
)
from fastrl.reward_shaping.lengths import (
    budgeted_cosine,
    exact_length,
    history_length,
    maximum_length,
    soft_overlong,
    truncated_to_zero,
    unfinished_penalised,
)
from fastrl.reward_shaping.outcomes import (
    cheap_mode,
    clipped,
    discounted_turns,
    ensemble_cautious,
    ensemble_mean,
    ensemble_worst,
    running_scaled,
    tool_efficiency,
    verified_or_unfinished,
    weighted_sum,
)

REWARD_SHAPINGS: dict[str, Callable[..., Tensor]] = {
    rule.__name__: rule
    for rule in (
        clipped,
        kl_penalised,
        chi_squared_penalised,
        root_chi_squared_penalised,
        constrained,
        soft_overlong,
        truncated_to_zero,
        unfinished_penalised,
        exact_length,
        maximum_length,
        history_length,
        budgeted_cosine,
        verified_or_unfinished,
        running_scaled,
        tool_efficiency,
        discounted_turns,
        cheap_mode,
        ensemble_mean,
        ensemble_worst,
        ensemble_cautious,
        weighted_sum,
    )
}
TOKEN_REWARD_SHAPINGS: dict[str, Callable[..., Tensor]] = {
    rule.__name__: rule
    for rule in (
        kl_penalised_tokens,
        whitened_kl_penalised_tokens,
        teacher_penalised_tokens,
        preference_tokens,
    )
}
