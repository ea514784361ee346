"""Set-up shared by all tests."""

import os
from collections.abc import Iterator, Sequence

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # processes that tests start: bits depend on the number
LONG = ("test_interpreted.py", "test_optim_memory.py", "test_peak_memory.py")
"""Files whose tests take a process of their own, many of them up to a minute."""


def dealt(
    items: Sequence[pytest.Item], long: Sequence[str], num_processes: int
) -> list[pytest.Item]:
    """The same tests in another order: each process has its share of the long ones first.

    pytest-xdist deals the list out in equal runs; a long test at the end of one would keep a single
    process busy while the others have nothing left.
    """
    first = [item for item in items if item.path.name in long]
    rest = [item for item in items if item.path.name not in long]
    found: list[pytest.Item] = []
    for process in range(num_processes):
        own = first[process::num_processes]
        share = (len(items) - len(found)) // (num_processes - process)
        count = max(0, share - len(own))
        found += [*own, *rest[:count]]
        del rest[:count]
    return found + rest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal out the long tests where pytest-xdist runs."""
    num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if num_processes > 1:
        items[:] = dealt(items, LONG, num_processes)


def pytest_make_parametrize_id(val: object) -> str | None:
    """A dtype by its name: "bfloat16" where pytest would number it."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: threads cost these small tensors minutes where the cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
