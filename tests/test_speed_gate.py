"""The gate on speed trips when a fast path is lost, and only then."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gate(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("speed_gate")


def busy(amount, loss=1.0):
    """A step that takes CPU time in proportion to the amount."""

    def step():
        sum(range(20000 * amount))
        return loss

    return step


def pair_of(gate, fast, slow, least=2.0):
    sides = gate.Side("quick", fast), gate.Side("plain", slow)
    return gate.Pair("quick against plain", lambda: sides, least)


def test_a_fast_path_passes(gate, capsys):
    assert gate.main([], pairs=(pair_of(gate, busy(5), busy(50)),)) == 0
    assert capsys.readouterr().out.startswith("ok    quick against plain")


def test_two_equal_sides_trip_it_and_both_are_shown(gate, capsys):
    assert gate.main([], pairs=(pair_of(gate, busy(10), busy(10)),)) == 1
    shown = capsys.readouterr().out
    assert "once more" in shown
    assert "LOST  quick against plain" in shown
    for name in ("quick", "plain"):
        after = shown.split(f"  {name}: median ")[1]
        assert len(after.splitlines()[1].split()) == 2 * gate.NUM_ROUNDS  # every round


def test_one_bad_measurement_is_forgiven(gate):
    calls = 0

    def slow_at_first():
        nonlocal calls
        calls += 1
        return busy(50 if calls <= 1 + gate.NUM_ROUNDS else 5)()

    pair = pair_of(gate, slow_at_first, busy(50))
    verdict = gate.judge(pair, pair.make())
    assert len(verdict.fast) == 2 * gate.NUM_ROUNDS
    assert gate.holds(pair, verdict)


def test_other_losses_are_no_speed(gate, capsys):
    assert gate.main([], pairs=(pair_of(gate, busy(5, loss=1.1), busy(50)),)) == 1
    shown = capsys.readouterr().out
    assert "WRONG" in shown
    assert "quick and plain differ" in shown
    assert "0x" not in shown


def test_a_pair_that_is_not_there(gate, capsys):
    with pytest.raises(SystemExit):
        gate.main(["--only", "nonsense"])
    assert "fused against naive" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["shared against padded", "shared against padded attention", "packed against padded"]
)
def test_both_sides_compute_the_same(gate, name):
    (pair,) = (pair for pair in gate.PAIRS if pair.name == name)
    assert pair.least > 1.1
    verdict = gate.compare(pair.make(), num_rounds=1)
    assert verdict.agree


def test_rows_can_be_kept(gate, tmp_path):
    path = tmp_path / "gate.json"
    gate.main(["--json", str(path)], pairs=(pair_of(gate, busy(5), busy(50)),))
    assert '"implementation": "plain"' in path.read_text(encoding="utf-8")
