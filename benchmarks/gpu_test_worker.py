"""A pytest plugin: one of several processes that share out the tests that all of them collect.

Each takes the first test, in the order of the list, that none has begun, so what matters most is
begun first. A process ends after a failure that leaves its CUDA context unusable: every test after
it would fail too. See gpu_tests.py, which starts them and reads what they write.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ["GPU_TESTS_FOLDER"])
WORKER = os.environ["GPU_TESTS_WORKER"]
BROKEN = 70
"""Exit status: the device answers this process no more."""


def write(**found: Any) -> None:
    """One line of what this process found, on the disk before anything else happens."""
    with (FOLDER / f"{WORKER}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


def claimed(test: str) -> bool:
    """Whether this process is the first that asks for the test; the name exists only once."""
    path = FOLDER / "begun" / sha256(test.encode()).hexdigest()
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.close(handle)
    return True


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported has failed, or is skipped; it is told once."""
    if not report.passed and claimed(report.nodeid):
        told = reason(report) if report.skipped else report.longreprtext
        write(test=report.nodeid, outcome=report.outcome, seconds=0.0, told=told)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the list of all, so that those that never ran have names."""
    write(all=[item.nodeid for item in items])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Pass over what another process has begun."""
    if not claimed(item.nodeid):
        return True
    # Fixtures of other files may stay from before those that were passed over.
    item.session._setupstate.teardown_exact(item)
    write(begun=item.nodeid, at=time.time())
    return None


class Outcome:
    """Of the test that runs now: pytest reports its three phases one by one."""

    worst = "passed"
    told = ""
    seconds = 0.0


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the test down once its last phase is over."""
    Outcome.seconds += report.duration
    if report.failed or (report.skipped and Outcome.worst == "passed"):
        Outcome.worst = report.outcome
        Outcome.told = reason(report) if report.skipped else Outcome.told + report.longreprtext
    if report.when == "teardown":
        write(
            test=report.nodeid, outcome=Outcome.worst, seconds=round(Outcome.seconds, 3),
            told=Outcome.told,
        )  # fmt: skip
        Outcome.worst, Outcome.told, Outcome.seconds = "passed", "", 0.0


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test, or a file of them, was skipped."""
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_logfinish() -> Iterator[None]:
    """Give back what the test held of the GPU, which the other processes need."""
    yield
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        write(broken=f"{type(error).__name__}: {error}")
        os._exit(BROKEN)
