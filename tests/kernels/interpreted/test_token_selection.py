"""select_tokens: the radix select keeps the tokens that sorted lists of numbers say."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels.token_selection import op, select_tokens
from tests.kernels.selection_cases import (
    AMOUNTS,
    KINDS,
    brute_force,
    make_lengths,
    make_mask,
    make_scores,
)

# Blocks are 32 tokens; up to 8 programs have 4 blocks and more of a sequence.
SEVERAL_PROGRAMS, ALL_PROGRAMS = 3 * 128 + 1, 8 * 128 + 333


def kept(scores: Tensor, mask: Tensor | None = None, **settings: Any) -> list[bool]:
    return select_tokens(scores, mask, **settings, implementation="triton").tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 67])
def test_the_largest_scores_are_kept_and_of_ties_the_first(kind: str, num_tokens: int) -> None:
    scores, mask = make_scores(kind, num_tokens, torch.float32), make_mask(num_tokens)
    for amount in AMOUNTS:
        assert kept(scores, mask, **amount) == brute_force(scores, mask, **amount)
    assert kept(scores, ratio=0.7) == brute_force(scores, ratio=0.7)


def test_scores_and_mask_that_are_columns_of_something_else() -> None:
    scores, mask = make_scores("ties", 123, torch.float32), make_mask(123)
    columns = torch.stack([-scores, scores], 1)[:, 1], torch.stack([~mask, mask], 1)[:, 1]
    assert not any(x.is_contiguous() for x in columns)
    assert kept(*columns, ratio=0.3) == brute_force(scores, mask, ratio=0.3)


@pytest.mark.parametrize("num_tokens", [SEVERAL_PROGRAMS, ALL_PROGRAMS])
@pytest.mark.parametrize("kind", ["normal", "ties", "infinities"])
def test_several_programs_share_a_sequence(kind: str, num_tokens: int) -> None:
    scores, mask = make_scores(kind, num_tokens, torch.float32), make_mask(num_tokens)
    assert kept(scores, mask, ratio=0.3) == brute_force(scores, mask, ratio=0.3)
    assert kept(scores, budget=200) == brute_force(scores, budget=200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    scores, mask = make_scores(kind, 123, dtype), make_mask(123)
    assert kept(scores, mask, ratio=0.4) == brute_force(scores, mask, ratio=0.4)


@pytest.mark.parametrize("num_sequences", [1, 3, 12])
def test_each_sequence_is_counted_alone(num_sequences: int) -> None:
    scores, mask = make_scores("ties", 457, torch.float32), make_mask(457)
    lengths = make_lengths(457, num_sequences)
    assert num_sequences == 1 or int(lengths.max()) > 32  # one sequence takes several blocks
    for amount in ({"ratio": 0.2}, {"budget": 3}):
        settings = {**amount, "per": "sequence", "lengths": lengths}
        assert kept(scores, mask, **settings) == brute_force(scores, mask, **settings)
    lengths[-1] -= int(lengths[-1] > 0)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    found = op._launch(scores, mask, bounds, 0.2, None)  # as on a GPU, where nobody adds them up
    num_tokens = int(lengths.sum())
    expected = brute_force(
        scores[:num_tokens], mask[:num_tokens], ratio=0.2, per="sequence", lengths=lengths
    )
    assert found.tolist() == expected + [False] * (457 - num_tokens)


def test_nothing_and_nothing_allowed() -> None:
    assert kept(torch.empty(0), ratio=0.5) == []
    forbidden = torch.zeros(75, dtype=torch.bool)
    assert not any(kept(torch.full((75,), torch.nan), forbidden, ratio=0.5))
    assert not any(kept(torch.ones(75), forbidden, budget=5))


def test_nan_is_kept_first_so_that_it_is_seen() -> None:
    scores = torch.tensor([torch.inf, 1.0, torch.nan, -torch.nan, 2.0])
    assert kept(scores, budget=1) == [False, False, True, False, False]
    assert kept(scores, budget=3) == [True, False, True, True, False]


def test_every_ratio_counts_as_on_the_cpu() -> None:
    scores = make_scores("normal", 100, torch.float32)
    for percent in range(4, 101, 8):  # 28 among them: 0.28 * 100 is 28.000000000000004
        assert sum(kept(scores, ratio=percent / 100)) == percent
