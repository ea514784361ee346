"""Loading built-in rewards, weights and names, and the weighted total."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastrl.errors import InputError
from fastrl.rewards import Reward, check_rewards, exact_reward, load_rewards, score_completions
from fastrl.tasks import load_task
from fastrl.types import Example, Prompts, Rollouts


def roll(examples, num_generations):
    """Rollouts whose completion b holds the b + 1 tokens 0 .. b."""
    num_completions = len(examples) * num_generations
    prompts = Prompts(tuple(torch.tensor([1]) for _ in examples), tuple(examples))
    completion_ids = tuple(torch.arange(b + 1) for b in range(num_completions))
    finished = torch.ones(num_completions, dtype=torch.bool)
    return Rollouts(prompts, completion_ids, None, finished)


@pytest.fixture
def file_task(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "q", "answer": "1"}))
    return load_task(f"jsonl:{path}", {}, seed=0, eval_size=0)


@pytest.fixture
def gym_task():
    return load_task("reasoning_gym:gcd", {}, seed=0, eval_size=1)


def of_scores(name, weight, scores):
    return Reward(name, weight, lambda examples, texts, completion_ids: scores)


def test_the_verifier_scores_each_row_against_its_own_prompt(gym_task):
    examples = [gym_task.train_example(i) for i in range(3)]
    rewards = load_rewards(["task", "exact"], [1.0, 0.5], gym_task)
    texts = [text for example in examples for text in (example.answer, "-7")]
    result = score_completions(roll(examples, 2), texts, rewards)
    assert result.total.tolist() == [1.5, 0.0] * 3
    assert {name: part.tolist() for name, part in result.parts.items()} == {
        "task": [1.0, 0.0] * 3,
        "exact": [1.0, 0.0] * 3,
    }
    assert result.total.dtype == torch.float32


def test_rows_are_grouped_by_prompt():
    seen = []

    def spy(examples, texts, completion_ids):
        seen.append((examples, texts, completion_ids))
        return [0.0] * len(texts)

    examples = [Example("a"), Example("b")]
    score_completions(roll(examples, 2), list("wxyz"), [Reward("spy", 1.0, spy)])
    rows = [examples[0], examples[0], examples[1], examples[1]]
    assert seen == [(rows, list("wxyz"), [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]])]


def test_total_is_the_weighted_sum_of_what_applies():
    rewards = [
        of_scores("a", 2.0, [1.0, None, 0.25]),
        of_scores("b", -0.5, [1.0, 3.0, None]),
    ]
    result = score_completions(roll([Example("q")], 3), ["", "", ""], rewards)
    assert result.total.tolist() == [1.5, -1.5, 0.5]
    assert result.parts["a"].isnan().tolist() == [False, True, False]
    assert result.parts["b"].isnan().tolist() == [False, False, True]


def test_a_completion_to_which_nothing_applies_is_an_error():
    rewards = [of_scores("a", 1.0, [1.0, None]), of_scores("b", 1.0, [None, None])]
    examples = [Example("first"), Example("second " * 20)]
    with pytest.raises(InputError, match=r"the prompt 'second .{0,60}\.\.\.': a, b returned None"):
        score_completions(roll(examples, 1), ["", ""], rewards)


def test_exact_strips_both_sides_and_needs_an_answer():
    examples = [Example("q", answer=" 4"), Example("q", answer="4"), Example("q")]
    assert exact_reward(examples, ["4\n", "4.0", "4"], [[0]] * 3) == [1.0, 0.0, None]


def test_built_in_rewards_by_name(file_task):
    rewards = load_rewards(["math", "exact"], None, file_task)
    assert [(reward.name, reward.weight) for reward in rewards] == [("math", 1.0), ("exact", 1.0)]
    example = file_task.train_example(0)
    result = score_completions(roll([example], 2), ["$1.0$", " 1 "], rewards)
    assert result.total.tolist() == [1.0, 2.0]


def test_check_scores_the_reference_answer_once():
    seen = []

    def spy(examples, texts, completion_ids):
        seen.append((texts, completion_ids))
        return [0.0]

    check_rewards([Reward("spy", 1.0, spy)], Example("q", answer="7"))
    check_rewards([Reward("spy", 1.0, spy)], Example("q"))
    assert seen == [(["7"], [[0]]), ([""], [[0]])]
    with pytest.raises(InputError, match="no reward applies to a completion of the prompt 'q'"):
        check_rewards([Reward("exact", 1.0, exact_reward)], Example("q"))


@pytest.mark.parametrize(
    ("specs", "weights", "message"),
    [
        (["task"], None, "has no verifier for the reward 'task'; use 'exact', 'math'"),
        (["maths"], None, r"unknown reward 'maths'; did you mean 'math'\?, or name a function"),
        ([], None, "expected at least one reward, got none; known: exact, math, task"),
        (["math"], [1.0, 2.0], "expected one weight per reward, 1, got 2; the rewards are math"),
        (["math"], [math.nan], "the weight of the reward 'math' must be finite, got nan"),
        (["math", "exact", "math"], None, "2 rewards are called 'math', and metrics are kept"),
        (["json:loads", "pickle:loads"], None, "2 rewards are called 'loads'"),
    ],
)
def test_bad_rewards(file_task, specs, weights, message):
    with pytest.raises(InputError, match=message):
        load_rewards(specs, weights, file_task)
