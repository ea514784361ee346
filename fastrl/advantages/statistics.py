"""Means and spreads that the estimators share, over each group and over everything.

Legend: B completions, N elements of a batch (completions or tokens). Values are shifted by one of
their own before they are averaged, so that equal values have a spread of exactly zero in every
precision and not one of rounding. NaN and infinite values stay visible: they make the statistics
they enter NaN and no others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.ragged import counts, means, number_of, stds

STD_EPSILON = 1e-4
"""Added to standard deviations, TRL's value."""
STD_FLOOR = 1e-8
"""A spread below this is rounding, not signal: the advantage is zero, not noise."""


def require_same_shape(**vectors: Tensor) -> None:
    """Raise ValueError unless the named vectors have one shape."""
    shapes = {name: tuple(vector.shape) for name, vector in vectors.items()}
    if len(set(shapes.values())) > 1 or any(vector.dim() != 1 for vector in vectors.values()):
        raise ValueError(
            f"{', '.join(shapes)} must be vectors of one length, got "
            f"{', '.join(map(str, shapes.values()))}; give one value per element of each"
        )


def alone(groups: Tensor) -> Tensor:
    """(B,) bool: whether a completion is the only one of its prompt."""
    return counts(groups, number_of(groups))[groups] == 1


def centre_in_groups(values: Tensor, groups: Tensor) -> Tensor:
    """(B,) values minus the mean of their group; a group of one is compared with zero."""
    require_same_shape(values=values, groups=groups)
    shifted = values - _first_of_group(values, groups)
    centred = shifted - means(shifted, groups, number_of(groups))[groups]
    return torch.where(alone(groups), values, centred)


def spread_in_groups(values: Tensor, groups: Tensor) -> Tensor:
    """(B,) sample standard deviation of the group of each value; 1 for a group of one."""
    spread = stds(centre_in_groups(values, groups), groups, number_of(groups))[groups]
    return torch.where(alone(groups), 1.0, spread)


def centre(values: Tensor) -> Tensor:
    """(N,) values minus the mean of all."""
    shifted = values - values[:1]
    return shifted - shifted.mean()


def spread(values: Tensor) -> Tensor:
    """Sample standard deviation of (N,) values, a scalar; 1 for fewer than two."""
    if values.numel() < 2:
        return values.new_ones(())
    return (centre(values).square().sum() / (values.numel() - 1)).sqrt()


def running_square(values: Tensor, past: Tensor, *, decay: float) -> Tensor:
    """(2,) decayed sum of squares and its weight: s <- (1 - decay) s + decay v^2, value by value.

    values: (N,), the oldest first; past: (2,) what came out before them, zeros for nothing. The
    weight is what s would be of ones, so that their quotient is a mean from the first value on.
    """
    ages = torch.arange(values.numel() - 1, -1, -1, dtype=past.dtype, device=values.device)
    shares = decay * (1 - decay) ** ages
    kept = past.to(values.device) * (1 - decay) ** values.numel()
    return kept + torch.stack([(shares * values.to(past).square()).sum(), shares.sum()])


def scale(centred: Tensor, std: Tensor, *, std_epsilon: float) -> Tensor:
    """centred / (std + std_epsilon); zero where the std is rounding."""
    return torch.where(std <= STD_FLOOR, 0.0, centred / (std + std_epsilon))


def whiten(values: Tensor, *, std_epsilon: float = 1e-8) -> Tensor:
    """(values - mean) / (sample standard deviation + std_epsilon) over all of them.

    values: (N,), of tokens or of completions. Zero where all are equal and for a single value.
    """
    return scale(centre(values), spread(values), std_epsilon=std_epsilon)


def _first_of_group(values: Tensor, groups: Tensor) -> Tensor:
    """(B,) value of the first completion of each one's group."""
    sizes = counts(groups, number_of(groups))
    starts = sizes.cumsum(0) - sizes
    return values[torch.argsort(groups, stable=True)[starts[groups]]]
