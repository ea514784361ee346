"""The same bits on every run, where threads come in any order."""

from __future__ import annotations

import os

import pytest
import torch
import torch.utils.deterministic

from fastrl.determinism import deterministic
from fastrl_kernels.shared_rows import select_rows


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(take, num_runs=60):
    """Of 600 rows of which one is taken every seventh time, as a shared prompt's last token is."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(600, (2800,), generator=generator)
    index[::7] = index[0]
    upstream = torch.randn(2800, 64, generator=generator)
    found = []
    for _ in range(num_runs):
        x = torch.zeros(600, 64, requires_grad=True)
        take(x, index).backward(upstream)
        found.append(x.grad)
    return found


def test_gradients_of_repeated_rows_have_the_same_bits(two_threads):
    first, *others = gradients(select_rows)
    assert all(torch.equal(first, other) for other in others)
    other = gradients(lambda x, index: x[index], 1)[0]  # of sums in whatever order
    torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-4)


def test_whatever_a_run_indexes_has_the_same_bits(two_threads):
    with deterministic():
        first, *others = gradients(lambda x, index: x[index])
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert all(torch.equal(first, other) for other in others)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("configured", [None, ":16:8"])
def test_products_on_a_gpu_have_the_workspace_that_torch_calls_deterministic(
    monkeypatch, configured
):
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    if configured is not None:
        monkeypatch.setenv(name, configured)
    with deterministic():
        assert os.environ[name] == (configured or ":4096:8")
    assert os.environ.get(name) == configured
