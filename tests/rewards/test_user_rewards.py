"""Users' reward functions: how they are found, what they receive and every way they can fail."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from fastrl.errors import InputError
from fastrl.rewards import Reward, score_completions
from fastrl.rewards.function import function_reward
from fastrl.rewards.score import NotFiniteReward
from fastrl.types import Example, Prompts, Rollouts

SOURCE = """
import asyncio
from dataclasses import dataclass
import numpy as np
import torch

@dataclass
class Scale:
    factor: float

def length(completions, **columns):
    return [float(len(text)) for text in completions]

def everything(**columns):
    return [sorted(columns)] and seen.append(columns) or [0.0] * len(columns["prompts"])

def some(prompts, completions, answer, level, weight=3.0):
    seen.append((prompts, completions, answer, level, weight))
    return [0] * len(prompts)

def ids(completion_ids):
    return [sum(row) for row in completion_ids]

def optional(completions):
    return [None if text == "skip" else True for text in completions]

def array(completions):
    return np.arange(len(completions), dtype=np.float32)

def tensor(completions):
    return torch.arange(len(completions))

def numpy_scalars(completions):
    return [np.float32(0.5) for _ in completions]

def crash(completions):
    raise KeyError("two\\nlines")

def short(completions):
    return [1.0]

def scalar(completions):
    return 1.0

def text(completions):
    return [1.0, "good"]

def nan(completions):
    return [1.0, float("nan")]

def infinite(completions):
    return [1.0, float("inf")]

def huge(completions):
    return [1.0, 1e39]

def needs_column(completions, difficulty):
    return [0.0] * len(completions)

def by_position(completions, /):
    return [0.0] * len(completions)

async def waits(completions):
    return [0.0] * len(completions)

class Waiter:
    async def __call__(self, completions):
        return [0.0]

waiter = Waiter()
seen = []
constant = 3
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    yield path
    sys.modules.pop(str(path.resolve()), None)


EXAMPLES = [
    Example("first prompt", answer="1", columns={"level": 2}),
    Example("second prompt " * 9, columns={"level": None}),
]


def score(source, name, examples=EXAMPLES, texts=("one", "three")):
    reward = function_reward(f"{source}:{name}")
    return reward(examples, list(texts), [[i] * (i + 1) for i in range(1, len(texts) + 1)])


def seen(source):
    return sys.modules[str(source.resolve())].seen


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("length", [3.0, 5.0]),
        ("ids", [2.0, 6.0]),
        ("array", [0.0, 1.0]),
        ("tensor", [0.0, 1.0]),
        ("numpy_scalars", [0.5, 0.5]),
    ],
)
def test_scores(source, name, scores):
    assert score(source, name) == scores


def test_none_means_does_not_apply(source):
    assert score(source, "optional", texts=("skip", "x")) == [None, 1.0]


def test_a_function_receives_what_its_signature_names(source):
    score(source, "some")
    prompts = [example.prompt for example in EXAMPLES]
    assert seen(source) == [(prompts, ["one", "three"], ["1", None], [2, None], 3.0)]


def test_keyword_arguments_receive_every_column(source):
    score(source, "everything")
    assert seen(source) == [
        {
            "prompts": [example.prompt for example in EXAMPLES],
            "completions": ["one", "three"],
            "completion_ids": [[1, 1], [2, 2, 2]],
            "answer": ["1", None],
            "level": [2, None],
        }
    ]


def test_chats_receive_completions_as_messages_and_missing_columns_as_none(source):
    chat = [{"role": "user", "content": "hi"}]
    score(source, "some", [Example(chat), EXAMPLES[0]])
    completions = [[{"role": "assistant", "content": "one"}], "three"]
    assert seen(source) == [
        ([chat, "first prompt"], completions, [None, "1"], [None, 2], 3.0),
    ]


def test_modules_in_the_current_directory_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "reward_module_here.py").write_text("def f(completions): return [2.0]\n")
    assert function_reward("reward_module_here:f")([Example("q")], ["x"], [[0]]) == [2.0]
    assert function_reward("reward_module_here.py:f")([Example("q")], ["x"], [[0]]) == [2.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crash", "raised KeyError: .*, in a batch that begins with the prompt 'first prompt'"),
        ("short", "must return one score per completion, 2, got 1 in a batch that begins with"),
        ("scalar", "must return a list with one number or None per completion, got float for"),
        ("text", "must return finite numbers or None, got 'good' for the prompt 'second prompt"),
        ("needs_column", "needs 'difficulty', which no column provides; known: answer, completion"),
        ("by_position", "takes 'completions' by position only"),
    ],
)
def test_bad_functions_are_named(source, name, message):
    with pytest.raises(InputError, match=message) as caught:
        score(source, name)
    assert f"my_rewards.py:{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shown"), [("nan", "nan"), ("infinite", "inf"), ("huge", r"1e\+39")]
)
def test_numbers_that_are_not_finite_cost_the_step_and_not_the_run(source, name, shown):
    """The function may return them; the total of the batch refuses them, by name."""
    assert score(source, name)[0] == 1.0
    rewards = (Reward(name, 1.0, function_reward(f"{source}:{name}")),)
    prompts = Prompts((torch.tensor([1]),) * 2, tuple(EXAMPLES))
    ids = (torch.tensor([0]),) * 2
    rollouts = Rollouts(prompts, ids, None, torch.ones(2, dtype=torch.bool))
    message = rf"^the reward '{name}' gave {shown} for a .* prompt 'second .{{40,60}}\.\.\.'$"
    with pytest.raises(NotFiniteReward, match=message) as caught:
        score_completions(rollouts, ["one", "three"], rewards)
    assert caught.value.rewards.total.tolist() == [1.0, 0.0]
    assert caught.value.rewards.parts[name].tolist() == [1.0, math.inf]
    assert caught.value.num_scores == 1


def test_a_crash_keeps_its_cause(source):
    with pytest.raises(InputError) as caught:
        score(source, "crash")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenght", r"my_rewards.py has no function 'lenght'; did you mean 'length'\?"),
        ("constant", "must be a function, got int"),
        ("waits", "is async, which is unsupported; write a plain def"),
        ("waiter", "is async, which is unsupported; write a plain def"),
    ],
)
def test_bad_names_in_a_file(source, name, message):
    with pytest.raises(InputError, match=message):
        function_reward(f"{source}:{name}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module_at_all:f", "there is no module 'no_such_module_at_all' here or installed"),
        ("json.nothing:f", "there is no module 'json.nothing' here or installed"),
        ("missing/file.py:f", "there is no file missing/file.py; paths are relative"),
        (":f", "expected MODULE:FUNCTION or path/to/file.py:FUNCTION, got ':f'"),
        ("json:", "expected MODULE:FUNCTION or path/to/file.py:FUNCTION, got 'json:'"),
        (
            "..json:loads",
            "cannot load the reward '..json:loads': importing ..json raised TypeError",
        ),
        ("builtins:max", "must be a Python function"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(InputError, match=message):
        function_reward(spec)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import no_such_dependency", "importing .* failed: No module named 'no_such_dependency'"),
        ("def f(:", "importing .*bad.py raised SyntaxError: "),
        ("1 / 0", "importing .*bad.py raised ZeroDivisionError: division by zero"),
        ("", "has no function 'f'; the module defines no function"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, body, message):
    path = tmp_path / "bad.py"
    path.write_text(body)
    with pytest.raises(InputError, match=message) as caught:
        function_reward(f"{path}:f")
    assert "\n" not in str(caught.value)
    sys.modules.pop(str(path.resolve()), None)
