"""Which prompts come next: the task's order, without those that the policy has solved.

Legend: P prompts, G num_generations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from fastrl.errors import InputError
from fastrl.tasks import Task
from fastrl.tasks.jsonl import JsonlTask
from fastrl.tasks.prompt import prompt_key
from fastrl.types import Example, StepMetrics

MAX_SKIPPED = 2**16
"""Prompts in a row that are passed over after which there is nothing left to learn."""


class Drawn(NamedTuple):
    """Prompts and their indices among the task's training examples."""

    examples: list[Example]
    indices: tuple[int, ...]


class PromptStream:
    """Hands out training examples; holds how far it is and how often each prompt was solved."""

    def __init__(self, task: Task, *, first: int, max_pass_rate: float | None = None) -> None:
        """first: index of the first example. max_pass_rate: where a prompt leaves; None: never."""
        self.task = task
        self.first = first
        self.cursor = first
        self.max_pass_rate = max_pass_rate
        self.history: dict[str, list[int]] = {}  # prompt -> completions that passed, and all
        self.leaves_out: Callable[[Example], bool] | None = None
        """Prompts that are never asked, by their values; None: there are none."""
        self.choose: Callable[[int, int], Sequence[int]] | None = None
        """Indices of so many prompts, after so many others; None: the next ones of the task."""
        self.tracked: dict[str, dict[str, Any]] = {}
        """What is remembered of prompts that were asked, see `fastrl.values.success_rates`."""
        self.values_key: str | None = None
        """Where the rewards of reference completions are kept; None: nowhere yet."""

    @cached_property
    def epoch_size(self) -> int | None:
        """Training examples of a file; None for a task that has no epochs."""
        if not isinstance(self.task, JsonlTask):
            return None
        return len(self.task.known_examples()) - len(self.task.eval_examples())

    def draw(self, num_prompts: int) -> Drawn:
        """The next examples of the task whose prompt is not solved, nor left out by its values."""
        if self.choose is not None:
            chosen = tuple(self.choose(num_prompts, self.cursor))
            self.cursor += num_prompts
            return Drawn([self.task.train_example(index) for index in chosen], chosen)
        examples: list[Example] = []
        indices: list[int] = []
        skipped = 0
        while len(examples) < num_prompts:
            example = self.task.train_example(self.cursor)
            self.cursor += 1
            if not self.is_solved(example) and not (self.leaves_out and self.leaves_out(example)):
                examples.append(example)
                indices.append(self.cursor - 1)
                skipped = 0
                continue
            skipped += 1
            if skipped == MAX_SKIPPED:
                raise InputError(self._nothing_left)
        return Drawn(examples, tuple(indices))

    @property
    def _nothing_left(self) -> str:
        if self.leaves_out is None:
            return (
                f"the next {MAX_SKIPPED} prompts have all passed max_pass_rate "
                f"{self.max_pass_rate:g}: there is nothing left to learn; stop here, raise it, or "
                "train on harder prompts"
            )
        return (
            f"the next {MAX_SKIPPED} prompts are all solved or left out by their values "
            "(min_solved): there is nothing left to learn; lower it, or train on easier prompts"
        )

    def record(self, examples: Sequence[Example], passed: Tensor) -> None:
        """Count (P, G) bool completions of the examples, if solved prompts leave at all."""
        if self.max_pass_rate is None:
            return
        for example, row in zip(examples, passed.tolist(), strict=True):
            before = self.history.get(_key(example), [0, 0])
            self.history[_key(example)] = [before[0] + sum(row), before[1] + len(row)]

    def is_solved(self, example: Example) -> bool:
        """Whether the prompt passed in so many of its completions so far that it leaves."""
        if self.max_pass_rate is None or _key(example) not in self.history:
            return False
        num_passed, num_sampled = self.history[_key(example)]
        return num_passed / num_sampled >= self.max_pass_rate

    @property
    def metrics(self) -> StepMetrics:
        """How many prompts are not asked again."""
        rate = self.max_pass_rate
        if rate is None:
            return {}
        solved = sum(passed / sampled >= rate for passed, sampled in self.history.values())
        return {"prompts/solved": float(solved)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        state: dict[str, Any] = {"cursor": self.cursor, "history": dict(self.history)}
        if self.values_key is not None:
            state["values"] = self.values_key
        if self.tracked:
            state["tracked"] = dict(self.tracked)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream over the same task was."""
        self.cursor = state["cursor"]
        self.history = dict(state["history"])
        self.values_key = state.get("values")
        self.tracked = dict(state.get("tracked", {}))


def _key(example: Example) -> str:
    """16 letters that stand for a prompt."""
    return hashlib.blake2b(prompt_key(example.prompt).encode(), digest_size=8).hexdigest()
