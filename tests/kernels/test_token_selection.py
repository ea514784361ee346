"""select_tokens on the CPU, and its reference, against sorted lists of Python numbers."""

from typing import Any

import pytest
import torch

from fastrl_kernels import select_tokens
from fastrl_kernels.token_selection import select_tokens_reference
from fastrl_kernels.token_selection.op import by_sorting
from tests.kernels.selection_cases import (
    AMOUNTS,
    KINDS,
    brute_force,
    make_lengths,
    make_mask,
    make_scores,
)


def select_by_sorting(
    scores: torch.Tensor, mask: torch.Tensor | None = None, *, ratio: float | None = None,
    budget: int | None = None, per: str = "batch", lengths: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What runs where there is neither a CPU nor Triton."""
    if per == "batch":
        lengths = torch.tensor([scores.numel()])
    elif lengths is None:
        lengths = torch.full((len(scores),), scores.shape[1])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    flat_mask = None if mask is None else mask.flatten()
    return by_sorting(scores.flatten(), flat_mask, bounds, ratio, budget).view(scores.shape)


FUNCTIONS = [select_tokens, select_tokens_reference, select_by_sorting]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_scores_are_kept_and_of_ties_the_first(
    kind: str, dtype: torch.dtype, function: Any
) -> None:
    for num_tokens in (1, 2, 63, 257):
        scores = make_scores(kind, num_tokens, dtype)
        for amount in AMOUNTS:
            for mask in (None, make_mask(num_tokens)):
                kept = function(scores, mask, **amount)
                assert kept.dtype == torch.bool
                assert kept.tolist() == brute_force(scores, mask, **amount)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_sequence_is_counted_alone(kind: str, function: Any) -> None:
    scores, mask = make_scores(kind, 257, torch.float32), make_mask(257)
    for num_sequences in (1, 5, 300):  # of 300, some are empty
        sequences = {"per": "sequence", "lengths": make_lengths(257, num_sequences)}
        for amount in AMOUNTS:
            expected = brute_force(scores, mask, **amount, **sequences)
            assert function(scores, mask, **amount, **sequences).tolist() == expected


@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_of_padded_scores_are_sequences(function: Any) -> None:
    scores, mask = make_scores("ties", 7 * 31, torch.float32), make_mask(7 * 31)
    padded, padded_mask = scores.view(7, 31), mask.view(7, 31)
    for amount in AMOUNTS:
        rows = [
            brute_force(row, allowed, **amount)
            for row, allowed in zip(padded, padded_mask, strict=True)
        ]
        assert function(padded, padded_mask, **amount, per="sequence").tolist() == rows
        together = function(padded, padded_mask, **amount)
        assert together.flatten().tolist() == brute_force(scores, mask, **amount)
    across = padded.T  # not contiguous
    columns = [brute_force(column, ratio=0.3) for column in across]
    assert function(across, ratio=0.3, per="sequence").tolist() == columns


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_token_and_no_token_allowed(function: Any) -> None:
    assert function(torch.empty(0), ratio=0.5).shape == (0,)
    assert function(torch.empty(3, 0), budget=2, per="sequence").shape == (3, 0)
    none = torch.zeros(5, dtype=torch.int64)
    assert function(torch.empty(0), budget=1, per="sequence", lengths=none).shape == (0,)
    forbidden = torch.zeros(9, dtype=torch.bool)
    for amount in AMOUNTS:
        assert not function(torch.ones(9), forbidden, **amount).any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_is_kept_first_so_that_it_is_seen(function: Any) -> None:
    scores = torch.tensor([torch.inf, 1.0, torch.nan, -torch.nan, 2.0])
    assert function(scores, budget=1).tolist() == [False, False, True, False, False]
    assert function(scores, budget=3).tolist() == [True, False, True, True, False]
    mask = torch.tensor([True, True, False, False, True])
    assert function(scores, mask, budget=1).tolist() == [True, False, False, False, False]


def test_a_ratio_counts_whole_tokens() -> None:
    """As a decimal number reads: 0.7 * 10 is 6.999999999999999 in binary."""
    for ratio, num_tokens, expected in ((0.7, 10, 7), (0.29, 100, 29), (0.999, 2, 1), (0.1, 5, 1)):
        assert int(select_tokens(torch.ones(num_tokens), ratio=ratio).sum()) == expected
