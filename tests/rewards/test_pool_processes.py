"""Whichever process ends, and however it ends: no other is left behind and nothing waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from fastrl.rewards import RewardPool
from fastrl.tasks import load_task
from fastrl.types import Example

SOURCE = """
import os, subprocess, sys, time

def process(completions):
    return [os.getpid()] * len(completions)

def libraries(completions):
    return [float("torch" in sys.modules or "transformers" in sys.modules)] * len(completions)

def parent(completions):
    return [os.getppid()] * len(completions)

def note(completions, log):
    child = subprocess.Popen(["sleep", "1000"])
    with open(log[0], "a") as file:
        file.write(f"{os.getpid()} {os.getppid()} {child.pid}\\n")
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass
"""

# No `if __name__ == "__main__"`: workers must not run the user's script again.
SCRIPT = """
import sys
from fastrl.rewards import RewardPool
from fastrl.types import Example

source, log = sys.argv[1:]
pool = RewardPool([f"{source}:note"], None, None, num_workers=2, timeout_s=1000.0)
for row in range(2):
    pool.submit(row, Example("q", columns={"log": log}), "x", [0], num_generations=1)
pool.collect()
"""

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def runs(pid):
    """Whether the process is there and more than an entry for its parent to read."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until(condition, seconds=30.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)


def noted(log, num_lines):
    """The workers, their supervisor and their children, once that many calls are running."""
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == num_lines)
    found = {int(word) for word in log.read_text().split()}
    assert all(map(runs, found))
    return found


def hang(pool, log):
    """Two calls that never end."""
    for row in range(2):
        example = Example("q", columns={"log": str(log)})
        pool.submit(row, example, "x", [0], num_generations=1)
    return noted(log, 2)


def hanging_pool(source, timeout_s=1000.0):
    return RewardPool([f"{source}:note"], None, None, num_workers=2, timeout_s=timeout_s)


def test_close_and_exceptions_end_all_processes(source, tmp_path):
    with pytest.raises(KeyError), hanging_pool(source) as pool:  # noqa: PT012  close is in it
        found = hang(pool, tmp_path / "log")
        start = time.perf_counter()
        raise KeyError
    assert time.perf_counter() - start < 5.0
    assert len(found) == 5
    wait_until(lambda: not any(map(runs, found)))  # what a reward started dies in its own time
    pool.close()  # again


def test_a_pool_that_is_forgotten_ends_its_processes(source, tmp_path):
    pool = hanging_pool(source)
    found = hang(pool, tmp_path / "log")
    del pool
    wait_until(lambda: not any(map(runs, found)))  # what a reward started dies in its own time


def test_what_a_reward_started_ends_with_it(source, tmp_path):
    with hanging_pool(source, timeout_s=1.0) as pool:
        found = hang(pool, tmp_path / "log")
        assert pool.collect().parts["note"].isnan().all()
        wait_until(lambda: sum(map(runs, found)) == 1)  # the supervisor


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_end_of_the_training_process_ends_all_others(source, tmp_path, number):
    log = tmp_path / "log"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(source), str(log)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C goes to a whole group, and this test is not in it
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found = noted(log, 2)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    wait_until(lambda: not any(map(runs, found)))
    assert process.returncode != 0
    assert (b"KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    assert errors.count(b"Traceback") == (number == signal.SIGINT)  # and none of a worker


def test_the_end_of_the_supervisor_ends_workers_and_is_told(source, tmp_path):
    with hanging_pool(source) as pool:
        hang(pool, tmp_path / "log")
        lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
        workers, supervisors, children = ({int(pid) for pid in x} for x in zip(*lines, strict=True))
        (supervisor,) = supervisors
        os.kill(supervisor, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="supervisor of the reward workers ended with exit"):
            pool.collect()
        wait_until(lambda: not any(map(runs, workers)))
        for child in children:  # which nobody is left to kill
            os.kill(child, signal.SIGKILL)


def test_a_worker_that_is_killed_while_idle_is_replaced(source):
    with RewardPool([f"{source}:process"], None, None, num_workers=1, timeout_s=60.0) as pool:
        seen = set()
        for _ in range(5):
            pool.submit(0, Example("q"), "x", [0], num_generations=1)
            worker = int(pool.collect().total.item())
            assert pool.metrics["rewards/crashes"] == 0
            seen.add(worker)
            os.kill(worker, signal.SIGKILL)
        assert len(seen) == 5


def test_a_pool_in_a_thread(source):
    scores = []

    def work():
        with RewardPool([f"{source}:process"], None, None, num_workers=2, timeout_s=0.5) as pool:
            for _ in range(2):
                pool.submit(0, Example("q"), "x", [0], num_generations=1)
                scores.append(pool.collect().total.item())
                time.sleep(1.0)  # longer than a call may take

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(scores) == 2
    assert scores[0] == scores[1] != os.getpid()  # a worker that nothing is asked of lives on


def test_no_more_workers_than_asked_for_and_one_supervisor(source):
    specs = [f"{source}:process", f"{source}:parent"]
    with RewardPool(specs, None, None, num_workers=3, timeout_s=60.0) as pool:
        for row in range(1000):
            pool.submit(row, Example("q"), "x", [0], num_generations=1)
        parts = pool.collect().parts
    assert 1 <= len(parts["process"].unique()) <= 3
    (supervisor,) = map(int, parts["parent"].unique().tolist())
    assert not runs(supervisor)


def test_workers_do_without_torch(source):
    load = partial(load_task, "reasoning_gym:gcd", {}, seed=0, eval_size=0)
    specs = [f"{source}:libraries", "task", "math", "exact"]
    with RewardPool(specs, None, load, num_workers=1, timeout_s=60.0) as pool:
        pool.submit(0, load().train_example(0), "1", [0], num_generations=1)
        assert pool.collect().parts["libraries"].item() == 0


def test_a_fork_of_the_supervisor_is_safe(source):
    """It has one thread, however many a numerical library would like to start."""
    with RewardPool([f"{source}:parent", "math"], None, None, num_workers=1, timeout_s=60) as pool:
        pool.submit(0, Example("q", "1"), "1", [0], num_generations=1)
        supervisor = int(pool.collect().parts["parent"].item())
        assert len(list(Path(f"/proc/{supervisor}/task").iterdir())) == 1
