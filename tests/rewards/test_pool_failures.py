"""Rewards that hang or crash cost one score, are counted, and take nothing else with them."""

from __future__ import annotations

import time
from functools import partial

import pytest

from fastrl.errors import InputError
from fastrl.rewards import RewardPool
from fastrl.rewards import pool as pool_module
from fastrl.tasks import load_task
from fastrl.types import Example

SOURCE = """
import ctypes
import os
import signal
import subprocess
import time

def stubborn():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM, signal.SIGINT})
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass

def sleep_holding_the_interpreter():
    ctypes.PyDLL(None).sleep(1000)  # no other thread of the process runs

def segfault():
    ctypes.string_at(0)

def take_all_memory():
    bytearray(1 << 60)

def hang_up():
    os.closerange(3, 1000)

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def leave_a_child():
    child = subprocess.Popen(["sleep", "1000"])
    with open(os.environ["CHILD_PID"], "w") as file:
        file.write(str(child.pid))
    time.sleep(1000)

def fork_and_exit():
    if os.fork() == 0:  # keeps the sockets of the worker open
        time.sleep(1000)
    os._exit(1)

ACTS = {
    "stubborn": stubborn,
    "sleep": lambda: time.sleep(1000),
    "sleep_in_c": sleep_holding_the_interpreter,
    "exit": lambda: os._exit(0),
    "sys_exit": lambda: exit(0),
    "segfault": segfault,
    "memory": take_all_memory,
    "hang_up": hang_up,
    "stop": stop,
    "child": leave_a_child,
    "fork": fork_and_exit,
}

def act(completions):
    for text in completions:
        ACTS.get(text, lambda: None)()
    return [float(len(text)) for text in completions]

def flood(completions):
    for text in completions:
        print(text * 1_000_000)
    return [1.0] * len(completions)
"""

TIMEOUTS = ["stubborn", "sleep", "sleep_in_c", "stop"]
CRASHES = ["exit", "sys_exit", "segfault", "memory", "hang_up", "fork"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def pool(source):
    specs = [f"{source}:act", "exact"]
    with RewardPool(specs, [1.0, 10.0], None, num_workers=2, timeout_s=1.0) as pool:
        yield pool


def total_of(pool, texts, *, answer, num_generations):
    for row, text in enumerate(texts):
        example = Example(f"prompt {row // num_generations}", answer)
        pool.submit(row, example, text, [0], num_generations=num_generations)
    return pool.collect()


@pytest.mark.parametrize("num_generations", [1, 5])
@pytest.mark.parametrize("guilty", TIMEOUTS + CRASHES)
def test_only_the_guilty_completion_has_no_score(pool, guilty, num_generations):
    texts = ["a", "bb", guilty, "dddd", "eeeee"]
    start = time.perf_counter()
    found = total_of(pool, texts, answer="bb", num_generations=num_generations)
    assert time.perf_counter() - start < 10.0
    assert found.total.tolist() == [1, 12, 0, 4, 5]
    assert found.parts["act"].isnan().tolist() == [text == guilty for text in texts]
    assert found.parts["exact"].tolist() == [0, 1, 0, 0, 0]
    assert pool.metrics["rewards/timeouts"] == (guilty in TIMEOUTS)
    assert pool.metrics["rewards/crashes"] == (guilty in CRASHES)


def test_nothing_applies_because_all_of_it_failed(pool):
    found = total_of(pool, ["sleep", "exit", "a"], answer=None, num_generations=3)
    assert found.total.tolist() == [0, 0, 1]
    assert found.parts["act"].isnan().tolist() == [True, True, False]
    assert found.parts["exact"].isnan().all()


def test_many_failures_among_many_completions(pool):
    bad = {17: "exit", 18: "segfault", 230: "sleep", 231: "stubborn", 511: "memory"}
    texts = [bad.get(row, "x" * (row % 9)) for row in range(512)]
    found = total_of(pool, texts, answer="xx", num_generations=8)
    expected = [0 if row in bad else len(x) + 10 * (x == "xx") for row, x in enumerate(texts)]
    assert found.total.tolist() == expected
    assert pool.metrics["rewards/timeouts"] == 2
    assert pool.metrics["rewards/crashes"] == 3
    assert pool.metrics["time/score_wait"] > 1.0


def test_a_reference_answer_that_hangs_or_crashes_is_an_error(pool):
    for answer, message in [("sleep", "took over 1 s on the ref"), ("exit", "ended its process")]:
        with pytest.raises(InputError, match=f"my_rewards.py:act' {message}.* 'the prompt'; mend"):
            pool.check(Example("the prompt", answer))


def test_verifiers_that_evaluate_what_a_model_wrote(source):
    load_countdown = partial(load_task, "reasoning_gym:countdown", {}, seed=0, eval_size=0)
    example = load_countdown().train_example(0)
    texts = ["9**9**9**9", str(example.answer), "\\boxed{9^{9^{9^{9}}}}"]
    with RewardPool(["task", "math"], None, load_countdown, num_workers=2, timeout_s=1.5) as pool:
        pool.check(example)
        start = time.perf_counter()
        for row, text in enumerate(texts):
            pool.submit(row, example, text, [0], num_generations=3)
        found = pool.collect()
        assert time.perf_counter() - start < 10.0
        assert found.total[1] == 2.0
        assert found.parts["task"].isnan().tolist() == [True, False, False]
        assert pool.metrics["rewards/timeouts"] >= 1


def test_what_a_reward_prints_is_seen_and_disturbs_nothing(source, capfd):
    with RewardPool([f"{source}:flood"], None, None, num_workers=1, timeout_s=60.0) as pool:
        for row, text in enumerate("pqr"):
            pool.submit(row, Example("q"), text, [0], num_generations=1)
        assert pool.collect().total.tolist() == [1, 1, 1]
    assert capfd.readouterr().out == "".join(f"{text * 1_000_000}\n" for text in "pqr")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import os; os._exit(0)", "loading the rewards .*bad.py:f ended the process; keep what"),
        ("raise KeyError('x')", "importing .*bad.py raised KeyError"),
        ("import time; time.sleep(1000)", "loading the rewards .*bad.py:f took over 1 s"),
    ],
)
def test_files_that_hang_or_crash_when_loaded(tmp_path, monkeypatch, body, message):
    path = tmp_path / "bad.py"
    path.write_text(body)
    monkeypatch.setattr(pool_module, "LOAD_SECONDS", 1.0)
    with RewardPool([f"{path}:f"], None, None, num_workers=2, timeout_s=60.0) as pool:
        start = time.perf_counter()
        with pytest.raises(InputError, match=message):
            pool.check(Example("q"))
        assert time.perf_counter() - start < 30.0
