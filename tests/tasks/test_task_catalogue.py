"""Every dataset of reasoning_gym works as a task with its default parameters."""

from __future__ import annotations

from copy import deepcopy

import pytest
from reasoning_gym.factory import DATASETS

from fastrl.tasks import list_tasks
from fastrl.tasks.procedural import ProceduralTask

NAMES = sorted(set(DATASETS) - {"composite"})  # composite has no default: it needs its parts


def test_the_list_has_every_dataset_with_its_parameters():
    summaries = {summary.name: summary.parameters for summary in list_tasks()}
    assert set(summaries) == {f"reasoning_gym:{name}" for name in DATASETS} | {
        "jsonl:PATH", "mixture",
    }  # fmt: skip
    assert "min_terms=2, max_terms=6" in summaries["reasoning_gym:chain_sum"]
    assert all("seed=" not in text and "\n" not in text for text in summaries.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_dataset_scores_its_own_answer(name):
    task = ProceduralTask(name, {}, seed=1, eval_size=1)
    example = task.train_example(0)
    assert example.prompt != task.eval_examples()[0].prompt
    before = deepcopy(example.columns["entry"])
    if example.answer is not None:
        assert task.score(example.answer, example) > 0.0
        assert task.score(example.answer, example) == task.score(example.answer, example)
    if name != "game_of_life_halting":  # reads any text without a yes as the answer no
        assert 0.0 <= task.score("@@", example) < 1.0
    assert example.columns["entry"] == before
