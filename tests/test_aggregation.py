"""Every rule against its formula, with empty and masked-out completions."""

import pytest
import torch

from fastrl.aggregation import AGGREGATIONS, constant, prompt_mean, sequence_mean, token_mean

LENGTHS = torch.tensor([3, 0, 5, 1, 2, 2])  # two groups of three, one completion left out


def test_formulae():
    total, counted = 13, 5
    assert token_mean(LENGTHS, 3, 8).tolist() == pytest.approx([1 / total] * 6)
    expected = [1 / (counted * max(n, 1)) for n in LENGTHS.tolist()]
    assert sequence_mean(LENGTHS, 3, 8).tolist() == pytest.approx(expected)
    assert constant(LENGTHS, 3, 8).tolist() == pytest.approx([1 / (counted * 8)] * 6)
    assert prompt_mean(LENGTHS, 3, 8).tolist() == pytest.approx([1 / 16] * 3 + [1 / 10] * 3)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean", "prompt_mean"])
def test_means_sum_to_one_over_all_tokens(name):
    weights = AGGREGATIONS[name](LENGTHS, 3, 8)
    assert float((weights * LENGTHS).sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_nothing_to_average_is_not_a_division_by_zero(name):
    weights = AGGREGATIONS[name](torch.zeros(4, dtype=torch.int64), 2, 8)
    assert torch.isfinite(weights).all()


def test_lengths_that_are_equal_make_all_means_alike():
    lengths = torch.full((6,), 4)
    expected = token_mean(lengths, 3, 4)
    for name in ("sequence_mean", "prompt_mean", "constant"):
        torch.testing.assert_close(AGGREGATIONS[name](lengths, 3, 4), expected)
