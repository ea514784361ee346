"""One clear error for every objective that cannot be trained.

Legend: S tokens.
"""

from __future__ import annotations

import difflib
import math

import torch
from torch import Tensor

from fastrl_kernels.objectives.objective import (
    REGULARISER_INPUTS,
    Objective,
    Parameter,
    Regulariser,
)
from fastrl_kernels.objectives.regularisers import REGULARISERS
from fastrl_kernels.objectives.source import Function, arguments_of, name_of
from fastrl_kernels.objectives.surrogates import SURROGATES

SURROGATE_INPUTS = 3  # logp, old_logp, advantage


def check_objective(objective: Objective, ref_logps: Tensor | None, tokens: Tensor) -> None:
    """Raise ValueError for anything but an objective with all that it needs for (S,) tokens."""
    if not isinstance(objective, Objective):
        near = difflib.get_close_matches(str(objective), [*SURROGATES, *REGULARISERS], n=1)
        hint = f"; did you mean Objective({near[0]}, ...)?" if near else ""
        raise ValueError(
            f"objective must be a fastrl_kernels.objectives.Objective, got {objective!r}; "
            f"there are the surrogates {', '.join(SURROGATES)}{hint}"
        )
    _check_function(
        "surrogate", objective.surrogate, SURROGATE_INPUTS, objective.hyper_parameters, tokens
    )
    for item in objective.regularisers:
        _check_regulariser(item, tokens)
    if objective.needs_ref_logps and ref_logps is None:
        raise ValueError(
            "a regulariser towards the reference needs ref_logps, got None; take them with "
            "linear_logps from the reference model, or set its coefficient to 0"
        )


def _check_regulariser(item: Regulariser, tokens: Tensor) -> None:
    if not isinstance(item, Regulariser):
        raise ValueError(
            f"regularisers must be a tuple of Regulariser, got {item!r} in it; write "
            "(Regulariser(k3, 0.04),)"
        )
    num_inputs = len(item.inputs)
    if arguments_of(item.function) is not None and not num_inputs:
        forms = " or ".join(f"({', '.join(inputs)})" for inputs in REGULARISER_INPUTS)
        raise ValueError(
            f"the arguments of the regulariser {name_of(item.function)} must begin with {forms}, "
            f"got {arguments_of(item.function)}; rename them"
        )
    _check_function("regulariser", item.function, num_inputs, item.hyper_parameters, tokens)
    _check_parameter(f"coefficient of {name_of(item.function)}", item.coefficient, tokens)


def _check_function(
    role: str, function: Function, num_inputs: int, hyper_parameters: tuple[Parameter, ...],
    tokens: Tensor,
) -> None:  # fmt: skip
    arguments = arguments_of(function)
    if arguments is None:
        raise ValueError(
            f"the {role} must be a function of a module's top level, got {function!r}; move it "
            "there, so that a kernel can be made of its source"
        )
    names = arguments[num_inputs:]
    if len(names) != len(hyper_parameters):
        raise ValueError(
            f"the {role} {name_of(function)} takes {len(names)} hyper_parameters"
            f"{' (' + ', '.join(names) + ')' if names else ''}, got {len(hyper_parameters)}: "
            f"{hyper_parameters}; give them in order"
        )
    for name, value in zip(names, hyper_parameters, strict=True):
        _check_parameter(f"{name} of {name_of(function)}", value, tokens)


def _check_parameter(name: str, value: Parameter, tokens: Tensor) -> None:
    if not isinstance(value, Tensor):
        if not torch.compiler.is_compiling() and math.isnan(value):
            raise ValueError(f"{name} must be a number, got NaN; look where it was made")
        return
    fits = value.shape in ((), (1,), tokens.shape)
    if not fits or not value.is_floating_point() or value.device != tokens.device:
        raise ValueError(
            f"{name} must be a number or floating point of shape (), (1,) or "
            f"{tuple(tokens.shape)} on {tokens.device}, got {value.dtype} of shape "
            f"{tuple(value.shape)} on {value.device}; give one value, or one per token"
        )


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
