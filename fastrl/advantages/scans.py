"""Sums along the tokens of each completion.

Legend: S trained tokens, T tokens of the longest completion, B completions. completion_index (S,)
is non-decreasing. The loops run over T, each step for all completions at once, and every completion
adds up in the same order as it would alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.statistics import require_same_shape
from fastrl.ragged import counts, number_of


def positions(completion_index: Tensor) -> Tensor:
    """(S,) int64 place of each token in its completion, the first being 0."""
    if (completion_index.diff() < 0).any():
        raise ValueError(
            "completion_index must be non-decreasing, with the tokens of a completion adjacent, "
            "got one that decreases; sort the tokens by completion"
        )
    lengths = counts(completion_index, number_of(completion_index))
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(completion_index.numel(), device=completion_index.device)
    return places - starts[completion_index]


def continues(completion_index: Tensor) -> Tensor:
    """(S,) bool: whether the next token belongs to the same completion."""
    is_same = completion_index[1:] == completion_index[:-1]
    return torch.cat([is_same, is_same.new_zeros(min(completion_index.numel(), 1))])


def next_in_completion(values: Tensor, completion_index: Tensor) -> Tensor:
    """(S,) value of the next token of the same completion; 0 after the last."""
    return torch.where(continues(completion_index), values.roll(-1), 0.0)


def recurrence(terms: Tensor, decays: Tensor, completion_index: Tensor) -> Tensor:
    """(S,) solution of x_t = term_t + decay_t x_{t+1} in each completion, 0 after the last token.

    terms, decays: (S,).
    """
    require_same_shape(terms=terms, decays=decays, completion_index=completion_index)
    time = positions(completion_index)
    if not time.numel():
        return terms.clone()
    shape = int(time.max()) + 1, number_of(completion_index)
    result = terms.new_zeros(shape)  # (T, B)
    result[time, completion_index] = terms
    decay = decays.new_zeros(shape)
    decay[time, completion_index] = decays
    for step in range(shape[0] - 2, -1, -1):
        result[step] += decay[step] * result[step + 1]
    return result[time, completion_index]


def discounted_returns(
    token_rewards: Tensor, completion_index: Tensor, *, discount: float = 1.0
) -> Tensor:
    """(S,) sum over the later tokens of a completion of discount^distance times their reward."""
    decays = torch.full_like(token_rewards, discount)
    return recurrence(token_rewards, decays, completion_index)


def running_sums(values: Tensor, completion_index: Tensor) -> Tensor:
    """(S,) sum of the values of a completion up to and including each token."""
    from_the_end = number_of(completion_index) - 1 - completion_index.flip(0)
    return discounted_returns(values.flip(0), from_the_end).flip(0)
