"""Several tasks as one, each with its share of the prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fastrl.errors import InputError
from fastrl.example import Example
from fastrl.tasks.prompt import example_key, prompt_start

if TYPE_CHECKING:
    from fastrl.tasks import Task

COLUMN = "task"
"""Where an example says which task it is from, as NAME#NUMBER; reward functions receive it."""
OTHERS = 100
FAR = 2**32
"""Where another prompt is looked for, so often, in place of one that another task holds out."""


class MixtureTask:
    """Prompts of several tasks in turns, as often as their weights say, evenly spread.

    Of any n prompts from the start, a task has its share to within one prompt, so that a step sees
    all of them. Columns that only some tasks have are None for the others.
    """

    name = "mixture"

    def __init__(self, parts: Sequence[Task], weights: Sequence[float]) -> None:
        """weights: above 0, of any sum."""
        if len(parts) < 2:
            raise InputError(f"a mixture needs two or more tasks, got {len(parts)}")
        for part, weight in zip(parts, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"the weight of {part.name} must be above 0, got {weight}")
        self.has_verifier = all(part.has_verifier for part in parts)
        self._parts = {f"{part.name}#{k}": part for k, part in enumerate(parts, start=1)}
        self._shares = [weight / sum(weights) for weight in weights]
        self._turns: list[tuple[str, int]] = []  # which task each prompt is from, its own index
        self._counts = [0] * len(parts)
        known = [example for part in parts for example in part.known_examples()]
        columns = {key: None for example in known for key in example.columns}
        if COLUMN in columns:
            raise InputError(f"a record has the key {COLUMN!r}, where a mixture names its task")
        self._columns = columns
        self._eval = [
            self._from(name, x) for name, part in self._parts.items() for x in part.eval_examples()
        ]
        self._held_out = {example_key(example) for example in self._eval}

    def train_example(self, index: int) -> Example:
        """Prompt `index` of the endless sequence in which the tasks take turns."""
        while len(self._turns) <= index:
            self._add_turn()
        name, row = self._turns[index]
        for other in range(OTHERS):
            example = self._parts[name].train_example(row + other * FAR)
            if example_key(example) not in self._held_out:
                return self._from(name, example)
        raise InputError(
            f"the prompts of {name} are held out by other tasks of the mixture, such as "
            f"{prompt_start(example.prompt)}; let the tasks have fewer prompts in common"
        )

    def eval_examples(self) -> list[Example]:
        """The held-out examples of all tasks, task by task."""
        return list(self._eval)

    def known_examples(self) -> list[Example]:
        """What each task knows before a run."""
        return [
            self._from(name, x) for name, part in self._parts.items() for x in part.known_examples()
        ]

    def score(self, completion: str, example: Example) -> float:
        """By the verifier of the task that the example is from."""
        name = str(example.columns[COLUMN])
        return self._parts[name].score(completion, example)

    def _from(self, name: str, example: Example) -> Example:
        return replace(example, columns={**self._columns, **example.columns, COLUMN: name})

    def _add_turn(self) -> None:
        """The task that is furthest behind its share is next; the first of equals."""
        total = len(self._turns) + 1
        behind = [
            share * total - count for share, count in zip(self._shares, self._counts, strict=True)
        ]
        part = behind.index(max(behind))
        self._turns.append((list(self._parts)[part], self._counts[part]))
        self._counts[part] += 1


def shares_of(total: int, weights: Sequence[float]) -> list[int]:
    """`total` things in proportion to the weights, each at least 1 (0 where there are none)."""
    if total == 0:
        return [0] * len(weights)
    return [max(1, round(total * weight / sum(weights))) for weight in weights]
