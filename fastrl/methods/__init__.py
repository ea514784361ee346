"""Policy-optimisation methods as data: a record names its choice on every axis.

The axes and their formulae: advantages.py, fastrl_kernels/objectives.py, aggregation.py. A choice
that is not implemented cannot be named, so a method never trains a different loss than it says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastrl.advantages import ADVANTAGES
from fastrl.aggregation import AGGREGATIONS
from fastrl.config import ObjectiveConfig
from fastrl.errors import InputError, nearest
from fastrl_kernels.objectives import REGULARISERS, SURROGATES, Objective

CLIPPING_SURROGATES = ("clipped_ratio", "truncated_importance")


@dataclass(frozen=True)
class Method:
    """One policy-optimisation method."""

    name: str
    source: str
    advantage: str = "group_relative"
    surrogate: str = "clipped_ratio"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    regulariser: str = "k3"
    beta: float = 0.0
    aggregation: str = "token_mean"

    @property
    def clips(self) -> bool:
        """Whether the surrogate bounds the ratio."""
        return self.surrogate in CLIPPING_SURROGATES

    @property
    def objective(self) -> Objective:
        """The loss of one token."""
        return Objective(
            SURROGATES[self.surrogate],
            (self.epsilon_low, self.epsilon_high) if self.clips else (),
            REGULARISERS[self.regulariser],
            self.beta,
        )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("grpo", "DeepSeekMath, arXiv:2402.03300", aggregation="sequence_mean"),
        Method("dr_grpo", "arXiv:2503.20783", advantage="group_centred", aggregation="constant"),
        Method("lite_ppo", "arXiv:2508.08221", advantage="batch_relative"),
        Method(
            "cispo",
            "MiniMax-M1, arXiv:2506.13585; bounds [0, 5] as in ScaleRL, arXiv:2510.13786",
            surrogate="truncated_importance",
            epsilon_low=1.0,
            epsilon_high=4.0,
        ),
        Method(
            "rloo",
            "arXiv:2402.14740",
            advantage="leave_one_out",
            surrogate="policy_gradient",
            aggregation="sequence_sum",
        ),
        Method(
            "reinforce",
            "Williams 1992",
            advantage="batch_centred",
            surrogate="policy_gradient",
            aggregation="sequence_sum",
        ),
    )
}

AXES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "advantage": ADVANTAGES,
    "surrogate": SURROGATES,
    "regulariser": REGULARISERS,
    "aggregation": AGGREGATIONS,
}
"""Every axis and what can be chosen on it, by name."""


def resolve_method(name: str, overrides: ObjectiveConfig) -> Method:
    """The method of that name with the given axes replaced; unknown names raise InputError."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; {nearest(name, list(METHODS))}")
    fields = {field.name for field in dataclasses.fields(Method)}
    chosen = {
        key: value
        for key, value in dataclasses.asdict(overrides).items()
        if key in fields and value is not None
    }
    for axis, known in AXES.items():
        if axis in chosen and chosen[axis] not in known:
            raise InputError(
                f"unknown objective.{axis} {chosen[axis]!r}; {nearest(chosen[axis], list(known))}"
            )
    method = dataclasses.replace(METHODS[name], **chosen)
    for bound in ("epsilon_low", "epsilon_high"):
        if bound in chosen and not method.clips:
            raise InputError(
                f"objective.{bound} has no effect on surrogate {method.surrogate!r}; "
                f"remove it or choose one of {', '.join(CLIPPING_SURROGATES)}"
            )
    if overrides.regulariser is not None and method.beta == 0.0:
        raise InputError("objective.regulariser has no effect with beta 0; set objective.beta")
    return method
