"""Several tasks in turns: shares, order, held-out prompts, verifiers."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

from fastrl.errors import InputError
from fastrl.report import read_metrics
from fastrl.run import train
from fastrl.tasks import load_task
from fastrl.tasks.mixture import shares_of
from tests.test_training import tiny_config, weights

SUMS = {"task": "reasoning_gym:chain_sum", "task_args": {"min_terms": 2, "max_terms": 2}}


def mixture(*entries, eval_size=6, seed=0, **options):
    args = {"tasks": list(entries)}
    return load_task("mixture", args, seed=seed, eval_size=eval_size, **options)


def jsonl(tmp_path, prompts, name="data"):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts))
    return f"jsonl:{path}"


def test_shares_hold_for_every_start_of_the_sequence():
    task = mixture({**SUMS, "weight": 3}, {"task": "reasoning_gym:leg_counting", "weight": 1})
    names = [task.train_example(index).columns["task"] for index in range(40)]
    for total in range(1, 41):
        counts = Counter(names[:total])
        assert abs(counts["reasoning_gym:chain_sum#1"] - 0.75 * total) < 1
    again = mixture({**SUMS, "weight": 3}, {"task": "reasoning_gym:leg_counting", "weight": 1})
    assert again.train_example(29) == task.train_example(29)  # whatever was asked before


def test_a_task_of_a_mixture_asks_what_it_asks_alone(tmp_path):
    data = jsonl(tmp_path, [f"q{i}" for i in range(9)])
    task = mixture(SUMS, {"task": data}, eval_size=4)
    alone = load_task("reasoning_gym:chain_sum", SUMS["task_args"], seed=0, eval_size=2)
    theirs = [task.train_example(index) for index in range(12)]
    sums = [example for example in theirs if "chain_sum" in example.columns["task"]]
    assert [x.prompt for x in sums] == [alone.train_example(i).prompt for i in range(6)]
    held_out = [example.prompt for example in task.eval_examples()]
    assert held_out[:2] == [example.prompt for example in alone.eval_examples()]
    assert len(held_out) == 4
    assert not set(held_out) & {example.prompt for example in theirs}
    assert sums[0].columns.keys() == theirs[1].columns.keys()


def test_the_verifier_is_that_of_the_example():
    legs = {"task": "reasoning_gym:leg_counting", "answer_tag": "answer"}
    task = mixture(SUMS, legs)
    assert task.has_verifier
    for index in range(6):
        example = task.train_example(index)
        is_tagged = "leg" in example.columns["task"]
        text = f"<answer>{example.answer}</answer>" if is_tagged else example.answer
        assert task.score(text, example) == 1.0
        assert task.score("no", example) < 1.0


def test_prompts_that_another_task_holds_out_are_replaced(tmp_path):
    first = jsonl(tmp_path, [f"q{i}" for i in range(20)], "first")
    (tmp_path / "held.jsonl").write_text('{"prompt": "q3"}\n{"prompt": "q4"}\n')
    second = {"task": first, "eval_path": str(tmp_path / "held.jsonl")}
    task = mixture({"task": first}, second, eval_size=4)
    seen = {task.train_example(index).prompt for index in range(200)}
    assert not {"q3", "q4"} & seen
    assert not {example.prompt for example in task.eval_examples()} & seen
    only = jsonl(tmp_path, ["q3", "q4"], "only")
    overlapping = mixture({"task": only}, {**second, "task": first, "weight": 9}, eval_size=2)
    with pytest.raises(InputError, match="are held out by other tasks"):
        [overlapping.train_example(index) for index in range(40)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "takes one argument, the list tasks .*got none"),
        ({"tasks": [SUMS], "min_terms": 2}, "takes one argument"),
        ({"tasks": [SUMS]}, "two or more tasks, got 1"),
        ({"tasks": [SUMS, {**SUMS, "weight": 0}]}, "weight of reasoning_gym:chain_sum must be"),
        ({"tasks": [SUMS, {**SUMS, "wait": 2}]}, "unknown key 'wait'.*'weight'"),
        ({"tasks": [SUMS, {"weight": 2}]}, "must be a table with the key task"),
        ({"tasks": [SUMS, {"task": "mixture"}]}, "cannot be a task of a mixture"),
        ({"tasks": [SUMS, {"task": "reasoning_gym:chain_sums"}]}, "did you mean"),
    ],
)
def test_bad_mixtures(args, message):
    with pytest.raises(InputError, match=message):
        load_task("mixture", args, seed=0, eval_size=4)


def test_shares_of_held_out_examples():
    assert shares_of(10, [1, 1]) == [5, 5]
    assert shares_of(10, [99, 1]) == [10, 1]
    assert shares_of(0, [1, 2]) == [0, 0]


def test_a_run_on_a_mixture_resumes_exactly(tmp_path):
    longer = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    more = {"task": "reasoning_gym:chain_sum", "weight": 2.0, "task_args": longer}
    config = tiny_config(tmp_path / "whole", task="mixture", task_args={"tasks": [SUMS, more]})
    rollout = dataclasses.replace(config.rollout, max_prompt_length=64)
    config = dataclasses.replace(config, rollout=rollout, max_tokens_per_pass=192)
    train(config)
    parted = dataclasses.replace(config, output_dir=str(tmp_path / "parted"))
    train(dataclasses.replace(parted, max_steps=2))
    train(parted, resume=True)
    rows = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
    again = [row for row in read_metrics(tmp_path / "parted") if "loss" in row]
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "parted")
    assert all((theirs[name] == value).all() for name, value in ours.items())


def test_without_a_size_held_out_files_are_used_whole(tmp_path):
    first = jsonl(tmp_path, [f"q{i}" for i in range(140)], "first")
    second = {
        "task": first,
        "eval_path": jsonl(tmp_path, ["a", "b"], "held").removeprefix("jsonl:"),
    }
    task = mixture({"task": first}, second, eval_size=None)
    assert [x.prompt for x in task.eval_examples()][-2:] == ["a", "b"]
    assert len(task.eval_examples()) == 64 + 2
