"""Rounds of sampling and the stream of prompts, without a model."""

from __future__ import annotations

import json

import pytest
import torch

from fastrl.errors import InputError
from fastrl.prompt_stream import MAX_SKIPPED, PromptStream
from fastrl.sampler import Scored, joined, of_prompts, sample_until_full
from fastrl.types import Example, Prompts, Rewards, Rollouts

G = 2


def scored(numbers: list[int]) -> Scored:
    """One prompt a number, whose tokens, rewards and texts tell which it is."""
    rows = [10 * number + g for number in numbers for g in range(G)]
    ids = tuple(torch.full((1 + row % 3,), row) for row in rows)
    return Scored(
        Rollouts(
            prompts=Prompts(
                tuple(torch.tensor([number]) for number in numbers),
                tuple(Example(prompt=str(number)) for number in numbers),
            ),
            completion_ids=ids,
            rollout_logps=tuple(-0.5 * x.double() for x in ids),
            finished=torch.tensor([row % 2 == 0 for row in rows]),
            rollout_entropies=tuple(0.25 * x.double() for x in ids),
        ),
        [f"text {row}" for row in rows],
        Rewards(torch.tensor(rows).float(), {"task": torch.tensor(rows).float() + 0.5}),
    )


def assert_same(found: Scored, expected: Scored) -> None:
    assert found.texts == expected.texts
    assert torch.equal(found.rewards.total, expected.rewards.total)
    assert torch.equal(found.rewards.parts["task"], expected.rewards.parts["task"])
    assert torch.equal(found.rollouts.finished, expected.rollouts.finished)
    assert found.rollouts.prompts.examples == expected.rollouts.prompts.examples
    for name in ("completion_ids", "rollout_logps", "rollout_entropies"):
        ours, theirs = getattr(found.rollouts, name), getattr(expected.rollouts, name)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    ours, theirs = found.rollouts.prompts.token_ids, expected.rollouts.prompts.token_ids
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_rounds_side_by_side_and_prompts_of_them():
    assert_same(joined([scored([3, 1]), scored([4]), scored([1])]), scored([3, 1, 4, 1]))
    assert_same(of_prompts(scored([3, 1, 4]), [2, 0]), scored([4, 3]))


class Asked:
    """A source of prompts 0, 1, ... of which only some teach something."""

    def __init__(self, good: set[int]) -> None:
        self.good = good
        self.rounds: list[int] = []

    def sample(self, num_prompts: int, number: int) -> Scored:
        assert number == len(self.rounds)
        first = sum(self.rounds)
        self.rounds.append(num_prompts)
        return scored(list(range(first, first + num_prompts)))

    def keeps(self, new: Scored) -> torch.Tensor:
        return torch.tensor([int(e.prompt) in self.good for e in new.rollouts.prompts.examples])


def test_prompts_are_sampled_until_the_step_is_full():
    asked = Asked({1, 4, 5, 8, 9})
    found = sample_until_full(asked.sample, asked.keeps, num_prompts=4, max_rounds=5)
    # 1 of 4 kept: three more at that rate are 12, of which 4 are asked; then 1 more at 3 of 8: 3.
    assert asked.rounds == [4, 4, 3]
    assert_same(found.everything, scored(list(range(11))))
    assert_same(found.trained, scored([1, 4, 5, 8]))
    assert found.num_missing == 0
    assert found.shortage is None
    assert found.metrics == {
        "dynamic_sampling/rounds": 3.0,
        "dynamic_sampling/sampled_prompts": 11.0,
        "dynamic_sampling/missing_prompts": 0.0,
    }


def test_a_full_first_round_is_all():
    asked = Asked(set(range(9)))
    found = sample_until_full(asked.sample, asked.keeps, num_prompts=3, max_rounds=5)
    assert asked.rounds == [3]
    assert found.trained is found.everything


def test_a_step_that_cannot_be_filled_trains_on_what_there_is():
    asked = Asked({2})
    found = sample_until_full(asked.sample, asked.keeps, num_prompts=3, max_rounds=2)
    assert asked.rounds == [3, 3]
    assert_same(found.trained, scored([2]))
    assert found.num_missing == 2
    assert "kept 1 prompts instead of 3 of 6 sampled in 2 rounds" in found.shortage
    assert "objective.max_sampling_rounds" in found.shortage


def test_a_step_without_any_prompt_keeps_everything_for_the_logs():
    asked = Asked(set())
    found = sample_until_full(asked.sample, asked.keeps, num_prompts=2, max_rounds=3)
    assert asked.rounds == [2, 2, 2]
    assert found.trained is found.everything
    assert found.num_missing == 2
    assert "kept no prompt of 6 sampled" in found.shortage
    assert "is skipped" in found.shortage


class Circle:
    """A task of few prompts that come again and again."""

    def __init__(self, num_prompts: int) -> None:
        self.num_prompts = num_prompts

    def train_example(self, index: int) -> Example:
        return Example(prompt=str(index % self.num_prompts))


def prompts(examples: list[Example]) -> list[int]:
    return [int(example.prompt) for example in examples]


def test_solved_prompts_leave_for_good_and_a_checkpoint_knows_them():
    stream = PromptStream(Circle(4), first=1, max_pass_rate=0.9)
    drawn, indices = stream.draw(4)
    assert indices == (1, 2, 3, 4)
    assert prompts(drawn) == [1, 2, 3, 0]
    passed = torch.zeros(4, 10, dtype=torch.bool)
    passed[0, :9] = True  # 9 of 10 is 0.9
    passed[1, :8] = True
    stream.record(drawn, passed)
    assert stream.metrics == {"prompts/solved": 1.0}
    assert prompts(stream.draw(4).examples) == [2, 3, 0, 2]
    again = PromptStream(Circle(4), first=1, max_pass_rate=0.9)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    solved = [Example(prompt="2")]
    for one in (stream, again):  # 8 of 10, and 10 of 10: 18 of 20 is 0.9
        one.record(solved, torch.ones(1, 10, dtype=torch.bool))
        assert prompts(one.draw(3).examples) == [3, 0, 3]
    assert stream.state_dict() == again.state_dict()


def test_a_state_stays_as_it_was_when_the_stream_goes_on():
    stream = PromptStream(Circle(2), first=0, max_pass_rate=0.5)
    examples = stream.draw(1).examples
    stream.record(examples, torch.tensor([[True, False, False]]))
    state = stream.state_dict()
    copy = json.loads(json.dumps(state))
    stream.record(examples, torch.tensor([[True, True, True]]))
    stream.draw(1)
    assert state == copy


def test_without_a_rate_nothing_is_remembered():
    stream = PromptStream(Circle(2), first=0)
    stream.record(stream.draw(2).examples, torch.ones(2, 3, dtype=torch.bool))
    assert stream.state_dict() == {"cursor": 2, "history": {}}
    assert stream.metrics == {}
    assert prompts(stream.draw(2).examples) == [0, 1]


def test_a_task_that_is_solved_is_an_error():
    stream = PromptStream(Circle(3), first=0, max_pass_rate=0.9)
    stream.record(stream.draw(3).examples, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="nothing left to learn"):
        stream.draw(1)
    assert stream.cursor == 3 + MAX_SKIPPED
