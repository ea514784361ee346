"""Tokens that several completions share and train, as two rows at the head at most.

Legend: S trained tokens, U rows they are merged into.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.packing import DistinctRows, Plan, distinct_rows
from fastrl_kernels.objectives import Objective, evaluate


class MergedTokens(NamedTuple):
    """What `policy_loss` takes for U rows instead of S tokens; `rows` says which is which."""

    rows: DistinctRows
    advantages: Tensor  # (U,)
    token_weights: Tensor  # (U,)
    old_logps: Tensor | None  # (U,)
    ref_logps: Tensor | None  # (U,)


def merge_shared_tokens(
    plan: Plan, advantages: Tensor, token_weights: Tensor, *, objective: Objective,
    old_logps: Tensor | None = None, ref_logps: Tensor | None = None,
    rollout_weights: Tensor | None = None,
) -> MergedTokens:  # fmt: skip
    """The (S,) constants of a loss, merged over the completions that share a token.

    A token of weights w and advantages A becomes one row for A > 0 and one for the others, each
    with the weight sum(w) and the advantage sum(w A) / sum(w). Rollout weights are factors of the
    advantages. The loss is the same, and its gradient, for surrogates that are a multiple of |A| on
    either side of 0, as all clips of a ratio are: they look at the sign of A to decide, and then
    multiply by it. One row with sum(w A) of both signs would be clipped on one side, or not at all.

    Refused where it is not exact: other surrogates, hyper-parameters of single tokens, negative
    weights, and tokens that share a row but not their old or reference log-probability. Take these
    through `plan.distinct_rows()`, and they do.
    """
    _check_objective(objective)
    for name, weights in (("token_weights", token_weights), ("rollout_weights", rollout_weights)):
        if weights is not None and bool((weights < 0).any()):
            raise ValueError(
                f"expected {name} of zero or more, got {float(weights.min())}; a negative weight "
                "belongs to the advantage"
            )
    rows = distinct_rows(plan.source_index, plan.target_ids, (advantages > 0).long())
    if rollout_weights is not None:
        advantages = advantages * rollout_weights
    weights = rows.total(token_weights)
    total = rows.total(token_weights * advantages)
    return MergedTokens(
        rows=rows,
        advantages=torch.where(weights > 0, total / weights, 0.0),
        token_weights=weights,
        old_logps=_common(rows, "old_logps", old_logps),
        ref_logps=_common(rows, "ref_logps", ref_logps),
    )


def merges_exactly(objective: Objective) -> bool:
    """Whether value and slope of the surrogate are a multiple of |A| on either side of 0.

    Tried on ratios from exp(-6) to exp(3) and advantages from 1/64 to 64.
    """
    distances = torch.linspace(-6, 3, 91, dtype=torch.float64)
    surrogate = objective._replace(regularisers=())

    def tried(advantage: float) -> Tensor:
        old_logps = torch.full_like(distances, -4.0)
        advantages = torch.full_like(distances, advantage)
        found = evaluate(surrogate, old_logps + distances, old_logps, None, advantages)
        return torch.stack([found.values, found.slopes])

    return not tried(0.0).any() and all(
        torch.allclose(tried(sign * 2.0**power), 2.0**power * tried(sign), rtol=1e-9, atol=0)
        for sign in (-1.0, 1.0)
        for power in range(-6, 7)
    )


def _check_objective(objective: Objective) -> None:
    parameters = [*objective.hyper_parameters]
    for item in objective.regularisers:
        parameters += [item.coefficient, *item.hyper_parameters]
    if any(isinstance(value, Tensor) and value.numel() > 1 for value in parameters):
        raise ValueError(
            "expected hyper-parameters that all tokens share, got one with a value per token; "
            "merge nothing, or use plan.distinct_rows()"
        )
    if not merges_exactly(objective):
        name = getattr(objective.surrogate, "__name__", objective.surrogate)
        raise ValueError(
            f"expected a surrogate that is a multiple of |A| on either side of 0, got {name}; "
            "merge nothing, or use plan.distinct_rows()"
        )


def _common(rows: DistinctRows, name: str, values: Tensor | None) -> Tensor | None:
    """(U,) the value that all tokens of a row have."""
    if values is None:
        return None
    found = rows.first(values)
    differences = (found[rows.index] - values).abs()
    if bool((differences != 0).any()):
        raise ValueError(
            f"expected the same {name} for the same token of all completions, got values that are "
            f"up to {float(differences.max()):.3g} apart; take them through plan.distinct_rows()"
        )
    return found
