"""pass@k against brute force over all subsets."""

import itertools

import pytest
import torch

from fastrl.evaluate import pass_at_k, powers_of_two


def test_pass_at_k_is_the_mean_over_all_subsets():
    generator = torch.Generator().manual_seed(0)
    passed = torch.rand(9, 6, generator=generator) < 0.3
    for k in range(1, 7):
        brute = [
            sum(any(subset) for subset in itertools.combinations(row, k))
            / sum(1 for _ in itertools.combinations(row, k))
            for row in passed.tolist()
        ]
        assert pass_at_k(passed, k) == pytest.approx(sum(brute) / len(brute), abs=1e-12)


def test_bounds():
    assert pass_at_k(torch.ones(3, 4, dtype=torch.bool), 1) == 1.0
    assert pass_at_k(torch.zeros(3, 4, dtype=torch.bool), 4) == 0.0
    with pytest.raises(ValueError, match="from 1 to the 4 samples"):
        pass_at_k(torch.ones(3, 4, dtype=torch.bool), 5)
    assert [powers_of_two(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4]]
