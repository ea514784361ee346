"""Per-token objectives: one pure function each, from scalars or tensors to (value, slope).

`value` is the surrogate to maximise (or the penalty to minimise) and `slope` its derivative with
respect to `logp`. The functions are plain arithmetic in the `tl` namespace without control flow, so
that one source serves a Triton kernel and, with `tl` bound to torch, the reference. Every argument
but the hyper-parameters is per token: logp (current policy), old_logp (policy that the update
started from), ref_logp (frozen reference), advantage. Stop-gradient quantities are arguments, so
`slope` needs no automatic differentiation. Log-ratios are clamped to +-20 before exp; past it the
ratio is constant and its slope zero.
"""

from __future__ import annotations

import difflib
import functools
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton.language as tl
except ImportError:  # triton has no build for this platform; the torch binding below needs none
    tl = torch


def policy_gradient(logp, old_logp, advantage):  # type: ignore[no-untyped-def]
    """A logp (REINFORCE, Williams 1992)."""
    return advantage * logp, advantage + 0.0 * logp


def importance_ratio(logp, old_logp, advantage):  # type: ignore[no-untyped-def]
    """rho A, the unclipped importance-sampled surrogate (Kakade and Langford 2002)."""
    log_ratio = logp - old_logp
    inside = (log_ratio > -20.0) & (log_ratio < 20.0)
    ratio = tl.exp(tl.where(log_ratio > 20.0, 20.0, tl.where(log_ratio < -20.0, -20.0, log_ratio)))
    return ratio * advantage, tl.where(inside, ratio * advantage, 0.0)


def clipped_ratio(logp, old_logp, advantage, epsilon_low, epsilon_high):  # type: ignore[no-untyped-def]
    """min(rho A, clip(rho) A) (PPO, arXiv:1707.06347; clip-higher: DAPO, arXiv:2503.14476)."""
    log_ratio = logp - old_logp
    inside = (log_ratio > -20.0) & (log_ratio < 20.0)
    ratio = tl.exp(tl.where(log_ratio > 20.0, 20.0, tl.where(log_ratio < -20.0, -20.0, log_ratio)))
    high = 1.0 + epsilon_high
    low = 1.0 - epsilon_low
    clipped = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    # Ties take the unclipped slope: only a ratio strictly outside on its own side stops learning.
    active = ((advantage <= 0.0) | (ratio <= high)) & ((advantage >= 0.0) | (ratio >= low)) & inside
    unclipped_value = ratio * advantage
    clipped_value = clipped * advantage
    value = tl.where(unclipped_value < clipped_value, unclipped_value, clipped_value)
    return value, tl.where(active, ratio * advantage, 0.0)


def truncated_importance(logp, old_logp, advantage, epsilon_low, epsilon_high):  # type: ignore[no-untyped-def]
    """sg[clip(rho, 1 - low, 1 + high)] A logp (CISPO, arXiv:2506.13585): none stops learning."""
    log_ratio = logp - old_logp
    ratio = tl.exp(tl.where(log_ratio > 20.0, 20.0, tl.where(log_ratio < -20.0, -20.0, log_ratio)))
    high = 1.0 + epsilon_high
    low = 1.0 - epsilon_low
    weight = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio)) * advantage
    return weight * logp, weight


def k1_score(logp, ref_logp):  # type: ignore[no-untyped-def]
    """sg[delta] logp: the score-function form of the reverse KL; unbiased on-policy gradient."""
    delta = logp - ref_logp
    return delta * logp, delta


def k2(logp, ref_logp):  # type: ignore[no-untyped-def]
    """delta^2 / 2 (Schulman 2020): its on-policy gradient is that of the reverse KL."""
    delta = logp - ref_logp
    return 0.5 * delta * delta, delta


def k3(logp, ref_logp):  # type: ignore[no-untyped-def]
    """exp(-delta) - 1 + delta (Schulman 2020; GRPO, arXiv:2402.03300 equation 4)."""
    delta = logp - ref_logp
    inside = (delta > -20.0) & (delta < 20.0)
    inverse = tl.exp(-tl.where(delta > 20.0, 20.0, tl.where(delta < -20.0, -20.0, delta)))
    return inverse - 1.0 + delta, tl.where(inside, 1.0 - inverse, 1.0)


SURROGATES: dict[str, Callable[..., Any]] = {
    "policy_gradient": policy_gradient,
    "importance_ratio": importance_ratio,
    "clipped_ratio": clipped_ratio,
    "truncated_importance": truncated_importance,
}
REGULARISERS: dict[str, Callable[..., Any]] = {"k1_score": k1_score, "k2": k2, "k3": k3}


class Objective(NamedTuple):
    """The loss of one token: -rollout_weight * surrogate + beta * regulariser.

    Both are functions of this module or the caller's own, of module level so that a kernel can be
    made of their source. `fastrl_kernels.policy_loss` has all of it inside one pass.
    """

    surrogate: Callable[..., Any]
    hyper_parameters: tuple[float, ...] = ()
    regulariser: Callable[..., Any] | None = None
    beta: float = 0.0

    @property
    def is_regularised(self) -> bool:
        """Whether ref_logps are needed."""
        return self.regulariser is not None and self.beta != 0.0


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
        if not objective.is_regularised or objective.regulariser is None:
            return TokenLosses(-gain, -gain_slope, clipped)
        if ref_logps is None:
            raise ValueError("expected ref_logps for an objective with beta > 0, got None")
        penalty, penalty_slope = bind_torch(objective.regulariser)(logps, ref_logps)
        return TokenLosses(
            values=objective.beta * penalty - gain,
            slopes=objective.beta * penalty_slope - gain_slope,
            clipped=clipped,
        )


def check_objective(objective: Objective, ref_logps: Tensor | None) -> None:
    """Raise ValueError for anything but an objective with all that it needs."""
    if not isinstance(objective, Objective):
        known = [*SURROGATES, *REGULARISERS]
        near = difflib.get_close_matches(str(objective), known, n=1)
        hint = f"; did you mean Objective({near[0]}, ...)?" if near else ""
        raise ValueError(
            f"objective must be a fastrl_kernels.objectives.Objective, got {objective!r}; "
            f"there are the surrogates {', '.join(SURROGATES)}{hint}"
        )
    _check_function("surrogate", objective.surrogate, 3, objective.hyper_parameters)
    if objective.regulariser is not None:
        _check_function("regulariser", objective.regulariser, 2, ())
    if objective.is_regularised and ref_logps is None:
        raise ValueError(
            "an objective with beta > 0 needs ref_logps, got None; take them with linear_logps "
            "from the reference model, or set beta=0"
        )


def _check_function(
    role: str, function: Callable[..., Any], num_tensors: int, hyper_parameters: tuple[float, ...]
) -> None:
    num_arguments = _num_arguments(function)
    if num_arguments is None:
        raise ValueError(
            f"the {role} must be a function of a module's top level, got {function!r}; move it "
            "there, so that a kernel can be made of its source"
        )
    if num_arguments != num_tensors + len(hyper_parameters):
        raise ValueError(
            f"the {role} {name_of(function)} takes {num_arguments - num_tensors} "
            f"hyper_parameters, got {len(hyper_parameters)}: {hyper_parameters}; give them in order"
        )


@torch.compiler.assume_constant_result
def _num_arguments(function: Callable[..., Any]) -> int | None:
    """Of a function that can be found again by its name; None for anything else."""
    source: Any = getattr(function, "fn", function)
    if not isinstance(source, types.FunctionType):
        return None
    found = getattr(sys.modules.get(source.__module__), source.__qualname__, None)
    num_arguments: int = source.__code__.co_argcount
    return num_arguments if getattr(found, "fn", found) is source else None


def check_per_token(name: str, tensor: Tensor | None, tokens: Tensor) -> None:
    """Raise ValueError unless there is one floating-point value for each of the tokens."""
    num_tokens = tokens.shape[0]
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"{name} must be a floating-point tensor, got {kind}; convert with .float()"
        )
    if tensor.shape != (num_tokens,) or tensor.device != tokens.device:
        raise ValueError(
            f"{name} must have one value per token, shape ({num_tokens},) on "
            f"{tokens.device}, got {tuple(tensor.shape)} on {tensor.device}; "
            "pack() repeats per-completion values for you"
        )


@torch.compiler.assume_constant_result
def name_of(function: Callable[..., Any]) -> str:
    """Where an objective's function can be imported from: "module:name", for operators."""
    source = getattr(function, "fn", function)
    return f"{source.__module__}:{source.__qualname__}"


def function_of(name: str) -> Callable[..., Any]:
    """The function that `name_of` named."""
    module_name, _, qualified_name = name.partition(":")
    module = sys.modules.get(module_name)
    function = getattr(module, qualified_name, None)
    if function is None:
        raise ValueError(
            f"an objective must be a function of a module's top level, got {name}; move it there, "
            "so that a kernel can be made of its source"
        )
    return getattr(function, "fn", function)


@functools.cache
def bind_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same source with `tl` bound to torch, for tensors of any dtype on any device."""
    source = getattr(function, "fn", function)  # a triton.jit function keeps its source in .fn
    namespace = {**source.__globals__, "tl": torch}
    return types.FunctionType(source.__code__, namespace, source.__name__, source.__defaults__)
