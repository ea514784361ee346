"""How much better each completion, or each of its tokens, is than expected.

Legend: B completions, S trained tokens. An estimator is a function of what its positional
parameters are named after; its keywords have the published values. It returns (B,) or, where
PER_TOKEN names it, (S,), of the dtype that it is given.

Where a group has a mean and a spread, a completion that is alone in its group is compared with
mean 0 and spread 1; the advantage is its reward. A group whose rewards are equal has zeros.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastrl.advantages.additions import budget_margin, early_tool_calls, reference_margin
from fastrl.advantages.answers import (
    answer_entropies,
    consistency_blended,
    set_relative,
    uncertainty_scaled,
)
from fastrl.advantages.baselines import (
    baseline_centred,
    baseline_whitened,
    log_mean_exp_value,
    reference_value_centred,
)
from fastrl.advantages.generalized import (
    action_level_advantages,
    generalized_advantages,
    length_adaptive_advantages,
    truncated_advantages,
    value_targets,
    whitened_generalized_advantages,
)
from fastrl.advantages.groups import (
    batch_centred,
    batch_relative,
    batch_rms,
    decoupled_rewards,
    good_policy_gradient,
    group_centred,
    group_relative,
    leave_one_out,
    length_weighted,
    outcome_sign,
    pass_at_k_max,
    token_group_relative,
    unit,
)
from fastrl.advantages.scans import discounted_returns
from fastrl.advantages.statistics import STD_EPSILON, STD_FLOOR, whiten
from fastrl.advantages.success_rates import beta_normalised, mixed
from fastrl.advantages.tokens import (
    optimal_token_baseline,
    whitened_group_centred,
    whitened_returns,
)

AdvantageEstimator = Callable[..., Tensor]

_COMPARE_A_GROUP: dict[str, AdvantageEstimator] = {
    "group_relative": group_relative,
    "group_centred": group_centred,
    "leave_one_out": leave_one_out,
    "batch_relative": batch_relative,
    "batch_rms": batch_rms,
    "length_weighted": length_weighted,
    "token_group_relative": token_group_relative,
    "good_policy_gradient": good_policy_gradient,
    "pass_at_k_max": pass_at_k_max,
    "decoupled_rewards": decoupled_rewards,
    "mixed": mixed,
    "beta_normalised": beta_normalised,
    "consistency_blended": consistency_blended,
    "uncertainty_scaled": uncertainty_scaled,
    "set_relative": set_relative,
    "reference_margin": reference_margin,
    "budget_margin": budget_margin,
    "early_tool_calls": early_tool_calls,
    "whitened_group_centred": whitened_group_centred,
    "optimal_token_baseline": optimal_token_baseline,
}
ADVANTAGES: dict[str, AdvantageEstimator] = {
    **_COMPARE_A_GROUP,
    "batch_centred": batch_centred,
    "outcome_sign": outcome_sign,
    "unit": unit,
    "baseline_centred": baseline_centred,
    "baseline_whitened": baseline_whitened,
    "reference_value_centred": reference_value_centred,
    "whitened_returns": whitened_returns,
    "generalized_advantages": generalized_advantages,
    "whitened_generalized_advantages": whitened_generalized_advantages,
    "length_adaptive_advantages": length_adaptive_advantages,
    "truncated_advantages": truncated_advantages,
    "action_level_advantages": action_level_advantages,
}
NEEDS_GROUPS = frozenset(_COMPARE_A_GROUP)
"""Estimators that compare completions of one prompt: they need at least two."""
PER_TOKEN = frozenset(
    {
        "whitened_group_centred",
        "optimal_token_baseline",
        "whitened_returns",
        "generalized_advantages",
        "whitened_generalized_advantages",
        "length_adaptive_advantages",
        "truncated_advantages",
        "action_level_advantages",
    }
)
"""Estimators that return one advantage per token, not per completion."""

__all__ = [
    "ADVANTAGES",
    "NEEDS_GROUPS",
    "PER_TOKEN",
    "STD_EPSILON",
    "STD_FLOOR",
    "AdvantageEstimator",
    "action_level_advantages",
    "answer_entropies",
    "baseline_centred",
    "baseline_whitened",
    "batch_centred",
    "batch_relative",
    "batch_rms",
    "beta_normalised",
    "budget_margin",
    "consistency_blended",
    "decoupled_rewards",
    "discounted_returns",
    "early_tool_calls",
    "generalized_advantages",
    "good_policy_gradient",
    "group_centred",
    "group_relative",
    "leave_one_out",
    "length_adaptive_advantages",
    "length_weighted",
    "log_mean_exp_value",
    "mixed",
    "optimal_token_baseline",
    "outcome_sign",
    "pass_at_k_max",
    "reference_margin",
    "reference_value_centred",
    "set_relative",
    "token_group_relative",
    "truncated_advantages",
    "uncertainty_scaled",
    "unit",
    "value_targets",
    "whiten",
    "whitened_generalized_advantages",
    "whitened_group_centred",
    "whitened_returns",
]
