"""The measuring side: processes, memory counts, tables, and suites that go on whatever happens."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import cases
import measure
import suite
from compare import judge
from implementations import logps_loaders
from inputs import Shape
from rows import Row, print_table, ratio, write_csv, write_json

TINY = Shape(64, 512, 16, torch.float32, "cpu")
MIB = 2**20


def row(name: str, *, correct: bool = True, milliseconds: float | None = 2.0) -> Row:
    return Row(
        "a case", name, correct, {"device": "a machine"}, p20_ms=milliseconds, p50_ms=milliseconds,
        p80_ms=milliseconds, peak_bytes=3 * MIB,
    )  # fmt: skip


def some_rows(case: str) -> list[Row]:
    return [dataclasses.replace(row("fastrl one"), case=case)]


def die(status: int) -> list[Row]:
    os._exit(status)


def refuse() -> list[Row]:
    raise OSError("no such model")


def start_child_and_hang(path: str) -> list[Row]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    Path(path).write_text(str(child.pid), encoding="utf-8")
    time.sleep(120)
    return []


def nested(value: int) -> int:
    return measure.in_fresh_process(abs, value)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def arguments(*words: str):
    return suite.make_parser("").parse_args(words)


def test_processes_answer_raise_and_nest():
    assert measure.in_fresh_process(nested, -3) == 3
    with pytest.raises(OSError, match="no such model"):
        measure.in_fresh_process(refuse)
    with pytest.raises(measure.ProcessLost, match="ended with status 5"):
        measure.in_fresh_process(die, 5)


def test_a_suite_goes_on_after_whatever_a_case_does(tmp_path, capsys):
    pid = tmp_path / "pid"
    hanging = functools.partial(start_child_and_hang, str(pid))
    made = [
        suite.SuiteCase("dies", functools.partial(die, 3), 60),
        suite.SuiteCase("hangs", hanging, 15),
        suite.SuiteCase("refuses", refuse, 60),
        suite.SuiteCase("works", functools.partial(some_rows, "works"), 60),
    ]
    if not torch.cuda.is_available():
        made.insert(0, suite.SuiteCase("gpu", functools.partial(some_rows, "gpu"), 60, "cuda"))
    path = tmp_path / "rows.json"
    args = arguments("--json", str(path), "--csv", str(tmp_path / "rows.csv"))
    assert suite.run_suite(made, args, absent=["cce: not installed"]) == 0
    notes = {found["case"]: found["note"] for found in json.loads(path.read_text())}
    assert notes.pop("gpu", None) in (None, "skipped: needs a CUDA device, found none")
    assert notes == {
        "dies": "its process ended with status 3",
        "hangs": "killed after 15 s",
        "refuses": "failed: OSError: no such model",
        "works": "",
    }
    assert not is_running(int(pid.read_text()))
    found = list(csv.DictReader((tmp_path / "rows.csv").open(encoding="utf-8")))
    assert found[-1]["absent"] == "cce: not installed"
    assert "absent: cce: not installed" in capsys.readouterr().out


def test_unknown_cases_are_one_line_each(capsys):
    made = [suite.SuiteCase(name, functools.partial(some_rows, name), 60) for name in "ab"]
    assert suite.run_suite(made, arguments("--only", "c", "d")) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"unknown case '{name}'; there are 'a', 'b'" for name in "cd"]
    assert suite.choose(made, ["b", "c"]) == made[1:]


def test_cases_without_time_are_noted_not_started():
    case = suite.SuiteCase("late", refuse, 60)
    (found,) = suite.run_case(case, 1.0)
    assert found.note == "skipped: the suite's time was used up"
    assert not found.correct


def test_no_speed_up_without_correctness_on_both_sides(capsys):
    ours, theirs = row("fastrl one"), row("peer", milliseconds=6.0)
    assert ratio(theirs, ours, "p50_ms") == 3.0
    print_table([ours, theirs])
    assert " 3.00 " in capsys.readouterr().out
    for pair in (
        [dataclasses.replace(ours, correct=False), theirs],
        [ours, dataclasses.replace(theirs, correct=False)],
    ):
        assert ratio(pair[1], pair[0], "p50_ms") is None
        print_table(pair)
        shown = capsys.readouterr().out
        assert " 3.00 " not in shown
        assert "incorrect" in shown
    assert ratio(row("peer", milliseconds=None), ours, "p50_ms") is None


def test_a_wrong_implementation_is_found():
    def off_by_a_little(hidden_states, weight, target_ids, temperature):
        logps, entropies = cases_naive(hidden_states, weight, target_ids, temperature)
        return logps + 0.01, entropies

    cases_naive = logps_loaders()["naive"]("cpu")
    loaders = {"naive": lambda device: cases_naive, "wrong": lambda device: off_by_a_little}
    prepared = cases.prepare(cases.Case("linear_logps", TINY), loaders=loaders)
    verdicts = {name: judge(step, prepared, TINY.dtype) for name, step in prepared.steps.items()}
    assert verdicts["naive"].correct
    assert not verdicts["wrong"].correct
    assert verdicts["wrong"].errors.logps == pytest.approx(0.01, rel=1e-2)


def test_tracked_peak_counts_blocks_exactly():
    def step() -> torch.Tensor:
        first = torch.ones(3 * MIB // 4)
        second = first.repeat(2)  # 3 + 6
        del first
        return second + 1  # 6 + 6

    found = measure.tracked_peak(step)
    assert found == pytest.approx(12 * MIB, abs=4096)


def test_rows_survive_json_and_csv(tmp_path):
    rows = [row("fastrl one"), row("peer", milliseconds=None)]
    write_json(tmp_path / "x" / "rows.json", rows)
    read = json.loads((tmp_path / "x" / "rows.json").read_text(encoding="utf-8"))
    assert [Row(**found) for found in read] == rows
    write_csv(tmp_path / "rows.csv", rows)
    first, second = csv.DictReader((tmp_path / "rows.csv").open(encoding="utf-8"))
    assert (first["p50_ms"], first["device"], second["p50_ms"]) == ("2.0", "a machine", "")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["rows.json"]
