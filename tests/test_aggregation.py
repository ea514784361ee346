"""Every rule against its formula, with ragged groups, empty and left-out completions."""

import inspect

import pytest
import torch

from fastrl.aggregation import (
    AGGREGATIONS,
    constant,
    fixed_constant,
    prompt_mean,
    sequence_mean,
    sequence_sum,
    summed,
    token_mean,
)

LENGTHS = torch.tensor([3, 0, 5, 1, 2, 2])
GROUPS = torch.tensor([1, 0, 0, 1, 3, 1])  # ragged, out of order, and no prompt 2


def weights_of(name, lengths, groups, max_completion_length=8):
    """The rule with its positional parameters bound by name."""
    data = {
        "lengths": lengths,
        "groups": groups,
        "max_completion_length": max_completion_length,
    }
    parameters = inspect.signature(AGGREGATIONS[name]).parameters.values()
    needed = [data[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return AGGREGATIONS[name](*needed)


def test_formulae():
    total, counted = 13, 5
    assert token_mean(LENGTHS).tolist() == pytest.approx([1 / total] * 6)
    expected = [1 / (counted * max(n, 1)) for n in LENGTHS.tolist()]
    assert sequence_mean(LENGTHS).tolist() == pytest.approx(expected)
    assert sequence_sum(LENGTHS).tolist() == pytest.approx([1 / counted] * 6)
    assert constant(LENGTHS, 8).tolist() == pytest.approx([1 / (counted * 8)] * 6)
    assert fixed_constant(LENGTHS).tolist() == pytest.approx([1 / 1000] * 6)
    assert fixed_constant(LENGTHS, denominator=64).tolist() == pytest.approx([1 / 64] * 6)
    assert summed(LENGTHS).tolist() == [1.0] * 6


def test_prompt_mean_of_ragged_groups():
    tokens = {0: 5, 1: 6, 3: 2}
    expected = [1 / (3 * tokens[group]) for group in GROUPS.tolist()]
    assert prompt_mean(LENGTHS, GROUPS).tolist() == pytest.approx(expected)


def test_a_prompt_without_tokens_leaves_the_prompt_mean():
    lengths = torch.tensor([4, 4, 0, 0])
    weights = prompt_mean(lengths, torch.tensor([0, 0, 1, 1]))
    assert weights[:2].tolist() == pytest.approx([1 / 8] * 2)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean", "prompt_mean"])
def test_means_sum_to_one_over_all_tokens(name):
    weights = weights_of(name, LENGTHS, GROUPS)
    assert float((weights * LENGTHS).sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_nothing_to_average_is_not_a_division_by_zero(name):
    lengths = torch.zeros(4, dtype=torch.int64)
    weights = weights_of(name, lengths, torch.tensor([0, 1, 1, 0]))
    assert weights.shape == (4,)
    assert weights.dtype == torch.float64
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_a_completion_left_out_is_as_if_it_were_never_there(name):
    kept = LENGTHS > 0
    among_all = weights_of(name, LENGTHS, GROUPS)[kept]
    assert torch.equal(among_all, weights_of(name, LENGTHS[kept], GROUPS[kept]))


def test_lengths_that_are_equal_make_all_means_alike():
    lengths, groups = torch.full((6,), 4), torch.tensor([0, 1, 0, 1, 0, 1])
    expected = token_mean(lengths)
    for name in ("sequence_mean", "prompt_mean", "constant"):
        torch.testing.assert_close(weights_of(name, lengths, groups, 4), expected)


@pytest.mark.parametrize("denominator", [0.0, -1.0, float("nan")])
def test_a_denominator_is_positive(denominator):
    with pytest.raises(ValueError, match="denominator above 0"):
        fixed_constant(LENGTHS, denominator=denominator)
