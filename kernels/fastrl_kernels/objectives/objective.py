"""The loss of one token as data: a surrogate, its hyper-parameters, and regularisers.

Legend: S tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.objectives.source import Function, arguments_of, bind_torch

Parameter = float | Tensor
"""A number, or a constant tensor of shape (), (1,) or (S,): one for all tokens, or one for each."""

REGULARISER_INPUTS = (("logp", "ref_logp"), ("logp", "old_logp"), ("logp", "old_logp", "ref_logp"))
"""What a regulariser may be a function of, by the names of its first arguments."""


class Regulariser(NamedTuple):
    """A penalty on every token: coefficient * function is added to its loss.

    The function takes logp and ref_logp, logp and old_logp, or all three, under these names, then
    the hyper-parameters, and returns the penalty and its derivative with respect to logp.
    """

    function: Function
    coefficient: Parameter = 1.0
    hyper_parameters: tuple[Parameter, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The one of REGULARISER_INPUTS that the function's arguments begin with."""
        names = arguments_of(self.function) or ()
        fitting = [inputs for inputs in REGULARISER_INPUTS if names[: len(inputs)] == inputs]
        return fitting[-1] if fitting else ()


class Objective(NamedTuple):
    """The loss of one token: -rollout_weight * surrogate + the sum of the regularisers.

    The functions are those of this package or the caller's own, of module level so that a kernel
    can be made of their source. `fastrl_kernels.policy_loss` has all of it inside one pass.
    """

    surrogate: Function
    hyper_parameters: tuple[Parameter, ...] = ()
    regularisers: tuple[Regulariser, ...] = ()

    @property
    def active_regularisers(self) -> tuple[Regulariser, ...]:
        """Those with a coefficient that is not the number zero."""
        return tuple(item for item in self.regularisers if not is_zero(item.coefficient))

    @property
    def needs_ref_logps(self) -> bool:
        """Whether an active regulariser looks at the reference policy."""
        return any("ref_logp" in item.inputs for item in self.active_regularisers)

    def rows(self, row_ids: Tensor, num_tokens: int) -> Objective:
        """The objective of some tokens: per-token parameters lose the other rows."""

        def of(parameters: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
            return tuple(rows_of(parameter, row_ids, num_tokens) for parameter in parameters)

        return Objective(
            self.surrogate,
            of(self.hyper_parameters),
            tuple(
                Regulariser(
                    item.function,
                    rows_of(item.coefficient, row_ids, num_tokens),
                    of(item.hyper_parameters),
                )
                for item in self.regularisers
            ),
        )


def is_zero(parameter: Parameter) -> bool:
    """Whether it is the number zero; a tensor may hold anything, and nobody waits to see."""
    return not isinstance(parameter, Tensor) and parameter == 0.0


def is_per_token(parameter: Parameter, num_tokens: int) -> bool:
    """Whether it has one value for each of several tokens."""
    return isinstance(parameter, Tensor) and parameter.shape == (num_tokens,)


def rows_of(parameter: Parameter, row_ids: Tensor, num_tokens: int) -> Parameter:
    """A parameter of some of the tokens."""
    if isinstance(parameter, Tensor) and is_per_token(parameter, num_tokens):
        return parameter[row_ids]
    return parameter


class TokenLosses(NamedTuple):
    """(S,) each, detached."""

    values: Tensor  # the loss of every token
    slopes: Tensor  # its derivative with respect to logp
    clipped: Tensor  # bool: an advantage, but the surrogate has no slope


def evaluate(
    objective: Objective, logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None,
    advantages: Tensor, rollout_weights: Tensor | None = None,
) -> TokenLosses:  # fmt: skip
    """Value and slope of the objective for S tokens, in the dtype of logps, without autograd."""
    with torch.no_grad():
        surrogate = bind_torch(objective.surrogate)
        gain, gain_slope = surrogate(logps, old_logps, advantages, *objective.hyper_parameters)
        clipped = (gain_slope == 0) & (advantages != 0)
        if rollout_weights is not None:
            gain, gain_slope = gain * rollout_weights, gain_slope * rollout_weights
        values, slopes = -gain, -gain_slope
        given = {"logp": logps, "old_logp": old_logps, "ref_logp": ref_logps}
        for item in objective.active_regularisers:
            arguments = [given[name] for name in item.inputs]
            value, slope = bind_torch(item.function)(*arguments, *item.hyper_parameters)
            values, slopes = values + item.coefficient * value, slopes + item.coefficient * slope
        return TokenLosses(values, slopes, clipped)
