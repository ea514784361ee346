"""An objective as arguments of an operator, which takes tensors, numbers and text only.

Legend: S tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.objectives.objective import (
    Objective,
    Parameter,
    Regulariser,
    is_per_token,
    is_zero,
)
from fastrl_kernels.objectives.source import function_of, name_of


class ObjectiveArguments(NamedTuple):
    """An objective and the weight of the entropy bonus, taken apart.

    The parameters are those of the surrogate, then for each regulariser its coefficient and its
    own, and last the weight of the entropy.
    """

    functions: str  # "module:name" of the surrogate and the active regularisers, with spaces
    counts: list[int]  # parameters of each
    numbers: list[float]  # every parameter, NaN where it is a tensor
    tensors: list[Tensor]  # those that are


def to_arguments(
    objective: Objective, entropy_coef: Parameter, dtype: torch.dtype, device: torch.device
) -> ObjectiveArguments:
    """Take an objective apart; tensors become constants of `dtype`.

    Under torch.compile every number becomes a tensor: a graph would be made anew for each value.
    """
    groups = _groups(objective)
    functions = [objective.surrogate, *(x.function for x in objective.active_regularisers)]
    parameters = [parameter for group in groups for parameter in group]
    if torch.compiler.is_compiling():
        parameters = [_as_tensor(x, device) for x in parameters]
        if not is_zero(entropy_coef):
            entropy_coef = _as_tensor(entropy_coef, device)
    parameters.append(entropy_coef)
    return ObjectiveArguments(
        " ".join(name_of(function) for function in functions),
        [len(group) for group in groups],
        [math.nan if isinstance(x, Tensor) else float(x) for x in parameters],
        [x.detach().to(dtype).contiguous() for x in parameters if isinstance(x, Tensor)],
    )


def _groups(objective: Objective) -> list[tuple[Parameter, ...]]:
    """Parameters of the surrogate, then of each active regulariser with its coefficient first."""
    regularisers = objective.active_regularisers
    return [
        objective.hyper_parameters,
        *((x.coefficient, *x.hyper_parameters) for x in regularisers),
    ]


def _as_tensor(parameter: Parameter, device: torch.device) -> Tensor:
    if isinstance(parameter, Tensor):
        return parameter
    return torch.full((1,), parameter, dtype=torch.float64, device=device)


def from_arguments(
    functions: str, counts: list[int], numbers: list[float], tensors: list[Tensor]
) -> tuple[Objective, Parameter]:
    """Put an objective together again, and the weight of the entropy."""
    given = iter(tensors)
    parameters = [next(given) if math.isnan(number) else number for number in numbers]
    surrogate, *others = [function_of(name) for name in functions.split()]
    start = counts[0]
    regularisers = []
    for function, count in zip(others, counts[1:], strict=True):
        coefficient, *own = parameters[start : start + count]
        regularisers.append(Regulariser(function, coefficient, tuple(own)))
        start += count
    objective = Objective(surrogate, tuple(parameters[: counts[0]]), tuple(regularisers))
    return objective, parameters[-1]


def no_gradients(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an operator's backward returns for such inputs: None, and one in a list of tensors each.

    The parameters of an objective are constants.
    """
    return tuple(
        [None] * len(x)
        if isinstance(x, list) and all(isinstance(item, Tensor) for item in x)
        else None
        for x in inputs
    )


class KernelParameters(NamedTuple):
    """The same for a kernel: numbers stay numbers, tensors become pointers with a stride."""

    parameters: tuple[Parameter, ...]
    strides: tuple[int, ...]  # -1: a number; 0: one value for all tokens; 1: one for each
    offsets: tuple[int, ...]  # where the parameters of each function end


def kernel_parameters(
    objective: Objective, entropy_coef: Parameter, num_tokens: int
) -> KernelParameters:
    """What `token_loss.kernel.token_loss` reads an objective from."""
    groups = _groups(objective)
    parameters = (*(parameter for group in groups for parameter in group), entropy_coef)
    offsets = tuple(sum(len(group) for group in groups[: i + 1]) for i in range(len(groups)))
    return KernelParameters(
        tuple(x if isinstance(x, Tensor) else float(x) for x in parameters),
        tuple(
            int(is_per_token(x, num_tokens)) if isinstance(x, Tensor) else -1 for x in parameters
        ),
        offsets,
    )
