"""math-verify as a reward: what counts as equal, and that nothing a model writes stops a run."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from fastrl.rewards import math as math_module
from fastrl.rewards.math import as_latex, math_reward
from fastrl.types import Example


def score(answer, *texts):
    return math_reward([Example("q", answer=answer)] * len(texts), texts, [[0]] * len(texts))


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("72", "so it is 72.", "so it is 73."),
        ("1/2", "\\boxed{0.5}", "\\boxed{0.25}"),
        ("\\frac{1}{2}", "thus $\\frac{2}{4}$", "thus $\\frac{2}{3}$"),
        ("$\\frac{1}{2}$", "0.5", "0.6"),
        ("\\boxed{3}", "3", "4"),
        ("x^2+1", "$1 + x^2$", "$1 + x$"),
        ("\\sqrt{2}", "$\\sqrt{2}$", "$2$"),
        ("(1, 2)", "\\boxed{(1,2)}", "2"),
        ("1, 2", "\\boxed{2, 1}", "2"),
        ("1,000", "1000", "1"),
        ("1e-3", "0.001", "$e - 3$"),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", "\\boxed{\\text{Alice}}"),
        ("5", "5", "five"),
        ("5", "5", ""),
    ],
)
def test_equal_expressions(answer, right, wrong):
    assert score(answer, right, wrong, right) == [1.0, 0.0, 1.0]


def test_no_answer_or_no_expression_in_it_does_not_apply():
    assert score(None, "1") == [None]
    assert score("$$", "1") == [None]


@pytest.mark.parametrize("answer", ["1e400", "NaN", "-Infinity", "1e99999999999"])
def test_numbers_that_cannot_be_written_out_stay_as_they_are(answer):
    assert as_latex(answer) == f"${answer}$"


def test_a_timeout_counts_as_wrong(monkeypatch, caplog):
    monkeypatch.setattr(math_module, "TIMEOUT_SECONDS", 1)
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        assert score("2", "\\boxed{9^{9^{9^{9}}}}") == [0.0]
    assert time.perf_counter() - start < 5.0
    assert "Timeout during comparison" in caplog.text


@pytest.mark.parametrize("text", ["$" + "(" * 500, "\\boxed{", "\\frac{1}{0}", "\x00", "$x^{$"])
def test_malformed_completions_count_as_wrong(text):
    assert score("2", text) == [0.0]


def test_it_works_outside_the_main_thread():
    scores = []
    thread = threading.Thread(target=lambda: scores.extend(score("1/2", "\\boxed{0.5}", "3")))
    thread.start()
    thread.join()
    assert scores == [1.0, 0.0]
