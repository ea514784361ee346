"""A pool scores what a single process scores, in any order of arrival, and computes it once."""

from __future__ import annotations

import json
import math
import time
from functools import partial

import pytest
import torch

from fastrl.errors import InputError
from fastrl.rewards import RewardPool, load_rewards, score_completions
from fastrl.rewards.cache import ScoreCache, score_key
from fastrl.rewards.calls import Call, joined, lost
from fastrl.tasks import load_task
from fastrl.types import Example, Prompts, Rollouts

SOURCE = """
import os

def length(completions, completion_ids, level):
    return [len(text) + 10 * sum(ids) + 100 * x
            for text, ids, x in zip(completions, completion_ids, level)]

def place(completions):
    return [10 * len(completions) + i for i in range(len(completions))]

def noted(completions, log):
    with open(log[0], "a") as file:
        file.writelines(f"{text}\\n" for text in completions)
    return [float(len(text)) for text in completions]

def noted_once(completions, log):
    return noted(completions, log)

noted_once.deterministic = True

def optional(completions):
    return [None if text == "skip" else 1.0 for text in completions]

def raises(completions):
    raise KeyError("two\\nlines")

def raises_at(completions):
    if "bad" in completions:
        raise ValueError(completions[0])
    return [0.0] * len(completions)

def text(completions):
    return ["good"] * len(completions)
"""

load_gcd = partial(load_task, "reasoning_gym:gcd", {}, seed=0, eval_size=0)


def roll(examples, num_generations):
    """Rollouts whose completion b holds b % 5 + 1 times the token b."""
    num_completions = len(examples) * num_generations
    prompts = Prompts(tuple(torch.tensor([1]) for _ in examples), tuple(examples))
    completion_ids = tuple(torch.full((b % 5 + 1,), b) for b in range(num_completions))
    finished = torch.ones(num_completions, dtype=torch.bool)
    return Rollouts(prompts, completion_ids, None, finished)


def pool_of(specs, weights=None, task=None, num_workers=2, timeout_s=60.0):
    return RewardPool(specs, weights, task, num_workers=num_workers, timeout_s=timeout_s)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def test_the_same_rewards_as_in_one_process(source):
    task = load_gcd()
    specs = ["task", "math", f"{source}:length", "exact"]
    weights = [1.0, 0.3, -0.7, 0.5]
    examples = []
    for index in range(43):
        example = task.train_example(index)
        examples.append(Example(example.prompt, example.answer, {**example.columns, "level": 2}))
    rollouts = roll(examples, 7)
    answers = [example.answer for example in examples for _ in range(7)]
    texts = [f"{x} " if b % 3 else str(b) for b, x in enumerate(answers)]
    expected = score_completions(rollouts, texts, load_rewards(specs, weights, task))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(3)).tolist()
    with pool_of(specs, weights, load_gcd) as pool:
        for rows in (order, order[::-1], range(len(texts))):
            for row in rows:
                ids = rollouts.completion_ids[row].tolist()
                pool.submit(row, examples[row // 7], texts[row], ids, num_generations=7)
            found = pool.collect()
            assert torch.equal(found.total, expected.total)
            assert list(found.parts) == ["task", "math", "length", "exact"]
            for name, part in expected.parts.items():
                assert torch.equal(found.parts[name], part)
        assert torch.equal(pool.score(rollouts, texts).total, expected.total)
        # All but the user's function have been asked all of it before.
        assert pool.metrics["rewards/cache_hits"] == 3 * len(texts)
        assert pool.metrics["rewards/timeouts"] == pool.metrics["rewards/crashes"] == 0


def test_a_function_gets_the_completions_of_one_prompt_in_the_order_of_their_rows(source):
    examples = [Example("a"), Example("b")]
    with pool_of([f"{source}:place"]) as pool:
        for row in (5, 0, 2, 1, 4, 3):
            pool.submit(row, examples[row // 3], "x", [0], num_generations=3)
        assert pool.collect().total.tolist() == [30, 31, 32, 30, 31, 32]
        for row in (1, 0, 3):  # fewer than were announced
            pool.submit(row if row < 2 else 2, examples[row // 2], "x", [0], num_generations=2)
        assert pool.collect().total.tolist() == [20, 21, 10]


def test_scoring_begins_before_anything_is_collected(source, tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    example = Example("q", "a", {"log": str(log)})
    with pool_of([f"{source}:noted", "exact", "math"]) as pool:
        for row, text in enumerate("abcd"):
            pool.submit(row, example, text, [0], num_generations=2)
            while row % 2 and log.read_text().split() != list("abcd"[: row + 1]):
                time.sleep(0.01)  # a test that waits for ever has failed
        assert pool.collect().parts["exact"].tolist() == [1, 0, 0, 0]


def test_score_submits_what_was_not(source):
    examples = [Example("a", columns={"level": 0}), Example("b", columns={"level": 1})]
    rollouts, texts = roll(examples, 2), ["x", "yy", "zzz", ""]
    with pool_of([f"{source}:length"]) as pool:
        for row in (3, 1):
            ids = rollouts.completion_ids[row].tolist()
            pool.submit(row, examples[row // 2], texts[row], ids, num_generations=2)
        assert pool.score(rollouts, texts).total.tolist() == [1, 22, 163, 220]


def test_completions_of_megabytes(source):
    texts = [str(row) * 1_000_000 for row in range(10)]
    ids = [[row] * 300_000 for row in range(10)]
    example = Example("q", texts[3], {"level": 1})
    with pool_of(["exact", f"{source}:length"], [1e8, 1.0]) as pool:
        for num_generations in (1, 10):
            for row, text in enumerate(texts):
                pool.submit(row, example, text, ids[row], num_generations=num_generations)
            parts = pool.collect().parts
            assert parts["exact"].tolist() == [float(row == 3) for row in range(10)]
            assert parts["length"].tolist() == [1_000_100 + 3_000_000 * row for row in range(10)]


def test_deterministic_functions_are_called_once_for_equal_completions(source, tmp_path):
    log = tmp_path / "log"
    example, other = (Example(name, columns={"log": str(log)}) for name in "ab")
    for name, num_hits, lines in [
        ("noted_once", 4, "p q p"),  # once for each example
        ("noted", 0, "p p q p p q p"),
    ]:
        log.write_text("")
        with pool_of([f"{source}:{name}"], num_workers=1) as pool:
            hits = 0.0
            for texts in ("pp", "qp", "pq"):
                for row, text in enumerate(texts):
                    pool.submit(row, example, text, [0], num_generations=1)
                assert pool.collect().total.tolist() == [1.0, 1.0]
                hits += pool.metrics["rewards/cache_hits"]
            pool.submit(0, other, "p", [0], num_generations=1)
            pool.collect()
            assert (hits, log.read_text().split()) == (num_hits, lines.split())
            pool.submit(0, example, "p", [0, 1], num_generations=1)  # other tokens, same text
            pool.collect()
            assert pool.metrics["rewards/cache_hits"] == 0


def test_the_cache_forgets_what_was_not_used_for_longest():
    cache = ScoreCache(num_scores=2)
    cache.put(b"a", 1.0)
    cache.put(b"b", None)
    assert cache.get(b"a") == 1.0
    cache.put(b"c", 3.0)
    assert [key in cache for key in (b"a", b"b", b"c")] == [True, False, True]
    assert len(cache) == 2


def test_different_scores_have_different_keys():
    parts = [
        (0, b"ab", "c", [1]),
        (0, b"ac", "bc", [1]),
        (0, b"ab", "c", [1, 1]),
        (0, b"ab", "c", []),
        (1, b"ab", "c", [1]),
        (0, b"ab", "\ud800", [1]),
    ]
    assert len({score_key(*part) for part in parts}) == len(parts)


def call(tickets, is_together=False):
    return Call(0, is_together, *(tuple(kind(x) for x in tickets) for kind in KINDS))


KINDS = (int, lambda x: str(x).encode(), str, lambda x: [x])


@pytest.mark.parametrize(
    ("num_answered", "current", "again", "guilty"),
    [
        (0, -1, [([1, 2, 3], False), ([4, 5], True), ([6], True)], ()),  # nothing begun
        (0, 0, [([2, 3], False), ([4, 5], True), ([6], True)], (1,)),
        (1, 2, [([2], False), ([4, 5], True), ([6], True)], (3,)),
        (3, 3, [([4, 5], False), ([6], True)], ()),  # one of two
        (1, 3, [([2, 3], False), ([4, 5], False), ([6], True)], ()),  # answers were lost too
        (3, 2, [([4, 5], True), ([6], True)], ()),  # between two calls
        (5, 5, [], (6,)),
        (6, 5, [], ()),
    ],
)
def test_what_a_lost_worker_leaves(num_answered, current, again, guilty):
    batch = [call([1, 2, 3]), call([4, 5], is_together=True), call([6], is_together=True)]
    found = lost(batch, num_answered, current)
    assert found.again == [call(*arguments) for arguments in again]
    assert found.guilty == guilty
    assert joined([call([1]), call([2, 3])], is_together=True) == call([1, 2, 3], is_together=True)


def test_none_is_nan_and_must_not_be_everything(source):
    example = Example("the prompt")
    with pool_of([f"{source}:optional", "exact"]) as pool:
        pool.submit(0, example, "x", [0], num_generations=1)
        found = pool.collect()
        assert (found.total.item(), math.isnan(found.parts["exact"].item())) == (1.0, True)
        pool.submit(0, example, "skip", [0], num_generations=1)
        message = "completion of the prompt 'the prompt': optional, exact returned None; give the"
        with pytest.raises(InputError, match=message):
            pool.collect()
        pool.check(example)  # it goes on


@pytest.mark.parametrize("name", ["raises", "text"])
def test_what_a_function_does_wrong_is_said_as_in_one_process(source, name):
    specs = [f"{source}:{name}"]
    example = Example("the prompt")
    with pytest.raises(InputError) as expected:
        score_completions(roll([example], 2), ["x", "y"], load_rewards(specs, None, None))
    with pool_of(specs) as pool:
        for _ in range(2):
            with pytest.raises(InputError) as found:
                pool.score(roll([example], 2), ["x", "y"])
            assert str(found.value) == str(expected.value)
            assert "my_rewards.py" in found.value.__notes__[0]  # where it happened
        with pytest.raises(InputError, match=r"my_rewards\.py"):
            pool.check(example)


def test_the_first_of_several_errors_is_told_whatever_the_order(source):
    examples = [Example(f"prompt {index}") for index in range(3)]
    with pool_of([f"{source}:raises_at"]) as pool:
        for rows in ((0, 1, 2), (2, 1, 0)):
            for row in rows:
                text = "bad" if row else "good"
                pool.submit(row, examples[row], text, [0], num_generations=1)
            with pytest.raises(InputError, match="begins with the prompt 'prompt 1'"):
                pool.collect()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maths", r"unknown reward 'maths'; did you mean 'math'\?, or name a function"),
        ("no_such_module_at_all:f", "there is no module 'no_such_module_at_all' here or installed"),
        ("missing/file.py:f", "there is no file missing/file.py; paths are relative"),
        ("task", "jsonl:.* has no verifier for the reward 'task'; use 'exact', 'math'"),
    ],
)
def test_rewards_that_cannot_be_loaded(tmp_path, spec, message):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "q", "answer": "1"}))
    task = partial(load_task, f"jsonl:{path}", {}, seed=0, eval_size=0)
    with pool_of([spec], task=task) as pool, pytest.raises(InputError, match=message):
        pool.check(Example("q"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "at least one worker, got 0"),
        ({"timeout_s": 0.0}, "time limit of a reward must be > 0 seconds, got 0.0"),
        ({"timeout_s": math.nan}, "must be > 0 seconds, got nan"),
        ({"weights": [1.0, 2.0]}, "expected one weight per reward, 1, got 2"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError, match=message):
        pool_of(["exact"], **options)


def test_examples_that_cannot_travel():
    with pool_of(["exact"]) as pool:
        example = Example("the prompt", "1", {"made_by": lambda: None})
        message = "the prompt 'the prompt' cannot be sent to a reward worker: .*plain data"
        with pytest.raises(InputError, match=message):
            pool.submit(0, example, "1", [0], num_generations=1)
