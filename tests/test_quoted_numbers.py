"""Every number that the README gives is one that was measured, or that a test holds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from committed import CPU, RESULTS, ROOT, read, rows_of
from quantities import QUANTITIES
from quoted_numbers import held_by, unproved, unproved_figures
from report_rows import DOCUMENTS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_number_of_the_readme_is_measured_or_held_by_a_test():
    lines = unproved(README)
    assert not lines, (
        "numbers that nothing stands behind; put <!-- measured:NAME --> or "
        f"<!-- test:PATH::NAME --> before them, see benchmarks/quoted_numbers.py: {lines}"
    )


WRITTEN = [path for path in DOCUMENTS if path.name != "results.md"]  # which is made as a whole


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_time_and_speed_of_the_documents_is_measured(path):
    lines = unproved_figures(path.read_text(encoding="utf-8"))
    assert not lines


def test_what_is_quoted_has_a_committed_result_with_its_command():
    quoted = re.findall(r"<!-- measured:(\w+) -->", README)
    assert quoted
    for name in quoted:
        content = read(RESULTS / CPU / f"{QUANTITIES[name].file}.json")
        for row in rows_of(content) or [content]:
            place = row.get("environment", content)
            assert place["command"], name
            assert place["commit"], name


def test_tests_that_hold_a_bound_exist():
    for path in DOCUMENTS:
        for file, name in held_by(path.read_text(encoding="utf-8")):
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (path, file, name)


@pytest.mark.parametrize(
    "line",
    [
        "an update is 3.1x faster",
        "a step takes 12 ms on it",
        "losses agree to 1.7e-6",
        "full fine-tuning in 6.6 bytes a parameter",
        "42% of the memory of TRL 1.16",
        "| update | 1234 |",
        "at P = 512, twice as fast as 3.5x",
        "<!-- measured:update_time -->0.13x of the time and 0.16x of the memory",
        "<!-- note --> 0.13x",
        "[the table](docs/table.md) says 7",
    ],
)
def test_a_number_out_of_nowhere_is_found(line):
    assert len(unproved(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "<!-- measured:update_time -->0.13x of the time",
        "fewer than <!-- test:tests/test_x.py::test_y -->7 bytes",
        "with `--rollout.num-generations 16` it runs",
        "```\nfastrl train --steps 300\n```",
        "Python 3.11 or newer, torch 2.13.0+cpu and TRL 1.16's trainer",
        "compiled for sm_80 to sm_120, float32, pass@1, Apache-2.0",
        "P = 1024, R = 64, 25M parameters, 2 cores (arXiv:2402.03300)",
        "the losses of TRL to 1e-6",
        "<!-- results:trainer -->\n| 3098 ms | 7.67x |\n<!-- end of results -->",
        "[page](docs/page2.md#part-3)",
    ],
)
def test_what_is_proved_or_no_measurement_is_let_through(line):
    assert unproved(line) == []


def test_figures_of_documents():
    assert unproved_figures("it is 2.5 times as fast and takes 3 s, not 4 ms") != []
    assert unproved_figures("between 10% and 80% of the steps, 64 tokens") == []
