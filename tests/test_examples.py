"""The examples run as they stand, on a CPU, and learn something; none is longer than a page."""

from __future__ import annotations

import contextlib
import io
import math
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
MAX_LINES = 39
FIGURE = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|nan|inf")
CHANGES = {"own_loop.py": 0.15, "offline_dpo.py": -0.05}
"""At least what the last line's figure is above the first's, or below it where negative."""


@pytest.fixture
def as_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another directory; random numbers and accelerate's settings as if nothing had run."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    monkeypatch.chdir(tmp_path)
    state._reset_state(reset_partial_state=True)
    with torch.random.fork_rng(devices=[]):
        yield
    state._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("as_in_a_process_of_its_own")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path: Path) -> None:
    for package in re.findall(r"^(?:from|import) (peft|trl|datasets|accelerate)", path.read_text(
        encoding="utf-8"
    ), re.MULTILINE):  # fmt: skip
        pytest.importorskip(package)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_path(str(path), run_name="__main__")
    lines = [line for line in output.getvalue().splitlines() if FIGURE.search(line)]
    figures = [[float(word) for word in FIGURE.findall(line)] for line in lines]
    assert figures
    assert all(math.isfinite(figure) for line in figures for figure in line)
    if path.name in CHANGES:
        change, least = figures[-1][0] - figures[0][0], CHANGES[path.name]
        assert len(figures) > 1
        assert change >= least if least > 0 else change <= least


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert text.startswith('"""')


def test_there_is_one_for_each_way_to_drop_in() -> None:
    assert {path.name for path in EXAMPLES} >= {"own_loop.py", "offline_dpo.py", "trl_drop_in.py"}
