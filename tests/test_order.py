"""The order in which processes get the tests: every test once, long ones first and shared out."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import LONG, dealt


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
@pytest.mark.parametrize("num_long", [0, 1, 5, 20])
@pytest.mark.parametrize("num_others", [0, 3, 100])
def test_every_test_once_and_the_long_ones_first(num_processes, num_long, num_others):
    items = [SimpleNamespace(path=Path("test_short.py"), index=i) for i in range(num_others)]
    step = max(1, len(items) // max(1, num_long))
    for i in range(num_long):
        items.insert(i * step, SimpleNamespace(path=Path("test_long.py"), index=-1 - i))
    found = dealt(items, ("test_long.py",), num_processes)
    assert sorted(x.index for x in found) == sorted(x.index for x in items)
    if num_others < 100:
        return
    start = 0
    for process in range(num_processes):  # as pytest-xdist deals them out
        size = (len(items) - start) // (num_processes - process)
        own = [x.index < 0 for x in found[start : start + size]]
        assert own == sorted(own, reverse=True)
        assert sum(own) in (num_long // num_processes, -(-num_long // num_processes))
        start += size


def test_the_files_of_long_tests_exist():
    names = {path.name for path in Path(__file__).parent.rglob("test_*.py")}
    assert set(LONG) <= names
