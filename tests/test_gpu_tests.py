"""The tests for a GPU are shared out to processes, and each outcome is written down, come what may.

Small files without torch take the place of those for a GPU.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # as a script there has it

import gpu_tests

FIRST = """
import os, sys, time, types
import pytest

pytestmark = pytest.mark.gpu

class Device:
    is_broken = False

    def is_initialized(self):
        return True

    def synchronize(self):
        if Device.is_broken:
            raise RuntimeError("an illegal memory access was encountered")

    def empty_cache(self):
        open("emptied", "a").write(".")

sys.modules["torch"] = types.SimpleNamespace(cuda=Device())

@pytest.fixture(scope="module")
def number():
    yield 3
    assert os.environ["GPU_TESTS_WORKER"]

def test_breaks_the_context():
    Device.is_broken = True
    assert False, "wrong numbers"

def test_hangs():
    open("hanging", "x").close()
    time.sleep(100)

def test_ends_its_process():
    os._exit(0)

@pytest.mark.parametrize("i", range(9))
def test_fine(number, i):
    open(f"ran {i} {os.getpid()}", "x").close()
    time.sleep(0.05)
    assert number == 3 and not Device.is_broken

def test_of_a_machine_that_is_another():
    pytest.skip("needs two GPUs")
"""
SECOND = """
import os
import pytest

@pytest.fixture(scope="module", autouse=True)
def number():
    yield 4

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(3))
def test_of_another_file(number, i):
    assert number == 4

@pytest.mark.gpu
def test_takes_all_the_memory():
    if not os.path.exists("alone"):
        raise RuntimeError("CUDA out of memory. Tried to allocate 80.00 GiB")

def test_that_needs_no_gpu():
    assert False
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    (tmp_path / "test_first.py").write_text(FIRST)
    (tmp_path / "test_second.py").write_text(SECOND)
    (tmp_path / "test_absent.py").write_text("import nothing_of_this_name\n")
    skips = "import pytest\npytest.importorskip('nothing_else')\n"
    (tmp_path / "test_elsewhere.py").write_text(skips)
    return tmp_path


def run(folder: Path, name: str, names: list[str], **changes: object) -> gpu_tests.Results:
    settings = {
        "options": [], "root": folder, "workers": 2, "until": time.time() + 120,
        "test_seconds": 3.0, "path": None,
    } | changes  # fmt: skip
    return gpu_tests.run(folder / name, names=names, **settings)


def test_every_test_runs_once_whatever_the_others_do(folder, capsys, monkeypatch):
    monkeypatch.setattr(gpu_tests, "environment", lambda: {"device": "none"})
    path = folder / "found.json"
    names = ["test_first.py", "test_absent.py", "test_elsewhere.py", "test_second.py"]
    results = run(folder, "all", names, path=path)
    outcomes = {test.rpartition("::")[2]: found for test, found in results.by_test.items()}
    failed = {test for test, found in outcomes.items() if found.outcome == "failed"}
    assert failed == {
        "test_absent.py", "test_breaks_the_context", "test_hangs", "test_ends_its_process",
        "test_takes_all_the_memory",
    }  # fmt: skip
    assert "wrong numbers" in outcomes["test_breaks_the_context"].told
    assert "in test_hangs\n" in outcomes["test_hangs"].told
    assert outcomes["test_hangs"].told.endswith("killed after 3 s")
    assert outcomes["test_ends_its_process"].told.endswith("ended its process, status 0")
    assert "nothing_of_this_name" in outcomes["test_absent.py"].told
    assert "could not import 'nothing_else'" in outcomes["test_elsewhere.py"].told
    assert sum(found.outcome == "passed" for found in outcomes.values()) == 9 + 3
    assert outcomes["test_of_a_machine_that_is_another"].told.endswith("needs two GPUs")
    assert list(results.broken.values()) == [
        "RuntimeError: an illegal memory access was encountered"
    ]
    ran = [file.name.split() for file in folder.glob("ran *")]
    assert sorted(int(index) for _, index, _ in ran) == list(range(9))
    assert len((folder / "emptied").read_text()) >= 10
    assert "FAILED test_first.py::test_hangs (3 s)" in capsys.readouterr().out

    gpu_tests.write_results(path, results)
    written = json.loads(path.read_text())
    assert written["counts"] == {"failed": 5, "passed": 12, "skipped": 2}
    assert [found["test"] for found in written["tests"][:2]] == results.tests[:2]
    told = gpu_tests.report(results, 9.0)
    assert told.endswith("5 failed, 12 passed, 2 skipped, 0 not run of 19 tests in 9 s")
    assert gpu_tests.exit_status(results) == 1

    (again,) = gpu_tests.without_memory(results)
    assert again == "test_second.py::test_takes_all_the_memory"
    (folder / "alone").touch()
    alone = run(folder, "again", [again], workers=1)
    assert [found.outcome for found in alone.all()] == ["passed"]


class UntilTheFileIsThere:
    """The end of the time, for one that waits for a test to hang."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __gt__(self, now: float) -> bool:
        return not self.path.exists()


def test_a_stop_leaves_what_had_run_and_names_the_rest(folder):
    names = ["test_second.py", "test_first.py"]
    options = ["-k", "of_another_file or hangs or fine"]
    results = run(
        folder, "stopped", names, options=options, workers=1, test_seconds=99.0,
        until=UntilTheFileIsThere(folder / "hanging"),
    )  # fmt: skip
    outcomes = {found.test: found for found in results.all()}
    done = [test for test, found in outcomes.items() if found.outcome == "passed"]
    assert done == [f"test_second.py::test_of_another_file[{i}]" for i in range(3)]
    assert [found.outcome for found in outcomes.values()].count("not run") == 10
    assert outcomes["test_first.py::test_hangs"].told.endswith("when it was stopped")
    assert outcomes["test_first.py::test_fine[0]"].told == ""
    assert gpu_tests.exit_status(results) == 124
    assert "not run test_first.py::test_fine[0]\n" in gpu_tests.report(results, 1.0)


def test_processes_that_begin_nothing_are_not_started_for_ever(folder, capsys):
    (folder / "conftest.py").write_text("import os; os._exit(9)\n")
    start = time.time()
    results = run(folder, "none", ["test_second.py"])
    assert time.time() - start < 60
    assert results.all() == []
    assert gpu_tests.exit_status(results) == 1
    assert "no process begins a test" in capsys.readouterr().out
