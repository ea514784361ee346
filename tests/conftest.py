"""Set-up shared by all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # processes that tests start: bits depend on the number


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: threads cost these small tensors minutes where the cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def memory_of_the_gpu_is_given_back() -> Iterator[None]:
    """After each test: several processes have one GPU, and what one keeps no other can have."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
