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

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # as a script there has it

import attention_cases
import cases
import loss_cases
import measure
import suite
import suite_cases
import update_cases
from compare import judge, measure_case
from implementations import logps_loaders, policy_loaders
from inputs import SPREAD, Shape, log_normal_lengths
from rows import Row, print_table, ratio, write_csv, write_json

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
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


def test_a_slow_implementation_does_not_cost_the_others_their_case(capsys):
    naive = logps_loaders()["naive"]("cpu")
    calls = []

    def slow_from_the_second_call_on(*args):
        calls.append(args)
        time.sleep(0.3 if len(calls) == 1 else 60)
        return naive(*args)

    def stuck(*args):
        time.sleep(60)

    functions = {"naive": naive, "slow": slow_from_the_second_call_on, "stuck": stuck}
    loaders = {name: lambda device, run=run: run for name, run in functions.items()}
    case = cases.Case("linear_logps", TINY)
    started = time.monotonic()
    rows = measure_case(
        "a case", case, functools.partial(cases.prepare, loaders=loaders), seconds=0.1,
        limit_seconds=4.0, with_memory=False,
    )  # fmt: skip
    assert time.monotonic() - started < 20
    notes = {row.implementation: row.note for row in rows}
    assert notes["slow"] == "failed: TimeoutError: took more than 0.2 s"
    assert notes["stuck"] == "failed: TimeoutError: took more than 1 s"
    (kept,) = (row for row in rows if row.implementation == "naive")
    assert kept.correct
    assert kept.p50_ms > 0


def test_nested_time_limits_end_with_the_outer_one():
    def outer_and_inner():
        with measure.time_limit(0.2):
            with pytest.raises(TimeoutError, match=r"more than 0\.05 s"), measure.time_limit(0.05):
                time.sleep(5)
            time.sleep(5)

    with pytest.raises(TimeoutError, match=r"more than 0\.2 s"):
        outer_and_inner()
    with measure.time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing is left of it


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


STOPPED = """
import functools, sys
sys.path[:0] = {paths!r}
import suite
from tests.test_benchmarks import some_rows, start_child_and_hang

if __name__ == "__main__":
    cases = [
        suite.SuiteCase("first", functools.partial(some_rows, "first"), 60),
        suite.SuiteCase("second", functools.partial(start_child_and_hang, {pid!r}), 100),
    ]
    suite.run_suite(cases, suite.make_parser("").parse_args(["--json", {path!r}]))
"""


def test_a_suite_that_is_stopped_keeps_what_it_has(tmp_path):
    path, pid, script = tmp_path / "rows.json", tmp_path / "pid", tmp_path / "stopped.py"
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), str(BENCHMARKS.parent / "kernels")]
    script.write_text(STOPPED.format(paths=paths, path=str(path), pid=str(pid)), encoding="utf-8")
    process = subprocess.Popen([sys.executable, script])
    deadline = time.monotonic() + 90
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 143
    assert [found["case"] for found in json.loads(path.read_text(encoding="utf-8"))] == ["first"]
    assert not is_running(int(pid.read_text()))


def test_lengths_are_log_normal_with_the_mean_that_was_asked_for():
    lengths = log_normal_lengths(128, 16, SPREAD)
    assert sum(lengths) == 128 * 16
    assert log_normal_lengths(128, 16, SPREAD) == lengths
    logs = torch.tensor(lengths).double().log()
    assert 0.6 * SPREAD < float(logs.std()) < 1.6 * SPREAD
    assert log_normal_lengths(7, 3, 0.0) == [7, 7, 7]


@pytest.mark.parametrize("spread", [0.0, SPREAD])
def test_attention_in_padded_and_in_packed_rows_is_the_same(spread):
    group = attention_cases.Group(13, 9, 3, 4, 2, 16, torch.float32, "cpu", spread)
    prepared = attention_cases.prepare(attention_cases.AttentionCase("attention", group))
    verdicts = {name: judge(step, prepared, torch.float32) for name, step in prepared.steps.items()}
    assert {"fastrl segment_attention", "sdpa, repeated rows", "sdpa, mask"} <= set(verdicts)
    assert all(verdict.correct for verdict in verdicts.values())
    seen = torch.zeros(group.num_tokens, group.num_tokens, dtype=torch.bool)
    for row in group.packed_rows:
        seen[row[:, None], row] |= torch.ones(len(row), len(row), dtype=torch.bool).tril()
    assert group.num_pairs == int(seen.sum())


def test_losses_of_sequences_that_differ_in_length():
    shape = dataclasses.replace(TINY, spread=SPREAD)
    names = ("fastrl policy_loss", "naive")
    loaders = {name: policy_loaders()[name] for name in names}
    prepared = cases.prepare(cases.Case("policy_loss", shape, 0.5), loaders=loaders)
    assert all(judge(step, prepared, TINY.dtype).correct for step in prepared.steps.values())


def test_every_objective_is_checked_with_its_gradient():
    shape = loss_cases.Tokens(123, "cpu")
    prepared = loss_cases.prepare(loss_cases.LossCase("objectives", shape))
    assert len(prepared.steps) == len(loss_cases.objectives()) > 30
    for step in prepared.steps.values():
        assert judge(step, prepared, torch.float32).correct
    plain = prepared.steps["fastrl clipped_ratio"]()
    other = plain._replace(objective=loss_cases.objectives()["policy_gradient"])
    errors = prepared.check(other)
    assert errors.hidden_grad is not None
    assert errors.hidden_grad > 0.1


def test_updates_agree_and_wrong_ones_are_found():
    prepared = update_cases.prepare(update_cases.UpdateCase(update_cases.TINY))
    tolerances = prepared.tolerances
    assert tolerances is not None
    for name in ("fastrl", "fastrl, recomputing", "padded rows, all logits"):
        assert prepared.check(prepared.steps[name]()).within(tolerances), name
    result = prepared.steps["fastrl"]()
    for parameter in result.model.parameters():
        parameter.grad.mul_(1.01)
    assert not prepared.check(result).within(tolerances)


@pytest.mark.parametrize("make_cases", [suite_cases.gpu_cases, suite_cases.cpu_cases])
def test_suites_have_every_case_once(make_cases):
    for tiny, most_seconds in ((True, 1e9), (False, 3600.0)):
        made = make_cases(tiny)
        assert sum(case.limit_seconds for case in made) < most_seconds
    names = [case.name for case in made]
    assert len(set(names)) == len(names)
    for group in ("stable" if make_cases is suite_cases.cpu_cases else "engines", "update"):
        assert any(f"[{group}]" in name for name in names[:3])


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
@pytest.mark.parametrize(
    "words", [["gpu_suite.py"], ["bench_policy_loss.py", "--quick", "--device", "cuda"]]
)
def test_a_gpu_that_is_not_there_is_one_line(words):
    command = [sys.executable, BENCHMARKS / words[0], *words[1:]]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stdout.count("\n") == 1
    assert "needs a CUDA device, found none" in answer.stdout
    assert "Traceback" not in answer.stderr


def test_a_case_from_beginning_to_end(tmp_path):
    """With the memory of every implementation, and a peer that nobody has."""
    path = tmp_path / "rows.json"
    command = [sys.executable, BENCHMARKS / "bench_selected_logps.py", "--quick", "--json", path]
    command += ["--only", "selected_forward", "--against", "naive", "nobody"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "unknown peer 'nobody'; there are fastrl selected_logps" in answer.stdout
    rows = [Row(**found) for found in json.loads(path.read_text(encoding="utf-8"))]
    assert [found.implementation for found in rows] == [
        "bare copies", "fastrl selected_logps", "naive",
    ]  # fmt: skip
    naive = rows[-1]
    logits = 256 * 8192 * 4
    # Log-probabilities, their exponentials and the product: three tensors the size of the logits.
    assert naive.tracked_peak_bytes == pytest.approx(3 * logits, rel=0.01)
    assert naive.peak_bytes == pytest.approx(naive.tracked_peak_bytes, rel=0.05)
    assert naive.correct
    assert naive.p20_ms <= naive.p50_ms <= naive.p80_ms
    assert naive.num_bytes == logits
    assert naive.gigabytes_per_second == pytest.approx(logits / naive.p50_ms / 1e6)
    assert naive.percent_of_floor == pytest.approx(100 * rows[0].p50_ms / naive.p50_ms)
    assert naive.copy_gigabytes_per_second > 0
    assert {"device", "torch", "commit", "command"} <= set(naive.environment)
