"""Tasks: where prompts come from and, where a task has a verifier, how completions are scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from fastrl.errors import InputError, nearest
from fastrl.example import Example
from fastrl.tasks.jsonl import JsonlTask
from fastrl.tasks.procedural import ProceduralTask, parameter_defaults

KINDS = ["reasoning_gym", "jsonl"]


class Task(Protocol):
    """A source of training prompts with a held-out set that shares no prompt with them."""

    name: str
    has_verifier: bool

    def train_example(self, index: int) -> Example:
        """The training example at any index >= 0; the same for the same seed and index."""

    def eval_examples(self) -> list[Example]:
        """The held-out examples, always in the same order."""

    def known_examples(self) -> list[Example]:
        """What can be checked before a run: a whole file, the held-out set of a generator."""

    def score(self, completion: str, example: Example) -> float:
        """The verifier's score of a completion; InputError where has_verifier is False."""


class TaskSummary(NamedTuple):
    """One line of the catalogue."""

    name: str  # as load_task takes it
    parameters: str  # "min_terms=2, max_terms=6"


def load_task(
    spec: str,
    args: Mapping[str, Any],
    *,
    seed: int,
    eval_size: int,
    eval_path: str | None = None,
    answer_tag: str | None = None,
    system_prompt: str | None = None,
) -> Task:
    """The task named by "reasoning_gym:NAME" or "jsonl:PATH".

    args: parameters of a reasoning_gym task. seed: >= 0, chooses the examples and their order.
    eval_size: held-out examples, 0 for none. eval_path: held-out file of a jsonl task, used whole.
    answer_tag: the verifier sees only the text inside the last <tag>...</tag>.
    """
    kind, separator, name = spec.partition(":")
    if not separator or not name:
        raise InputError(
            f"expected a task like 'reasoning_gym:chain_sum' or 'jsonl:PATH', got {spec!r}"
        )
    if kind not in KINDS:
        raise InputError(f"unknown kind of task {kind!r} in {spec!r}; {nearest(kind, KINDS)}")
    if seed < 0 or eval_size < 0:
        raise InputError(f"seed and eval_size must be >= 0, got {seed} and {eval_size}")
    if kind == "jsonl":
        _refuse_for_jsonl(args, answer_tag)
        return JsonlTask(
            name, seed=seed, eval_size=eval_size, eval_path=eval_path, system_prompt=system_prompt
        )
    if eval_path is not None:
        raise InputError(
            f"eval_path is for jsonl tasks, and {spec!r} generates its own held-out set; remove "
            "eval_path and set eval_size"
        )
    return ProceduralTask(
        name,
        args,
        seed=seed,
        eval_size=eval_size,
        answer_tag=answer_tag,
        system_prompt=system_prompt,
    )


def list_tasks() -> list[TaskSummary]:
    """Every reasoning_gym dataset with its parameters, and the jsonl kind."""
    from reasoning_gym.factory import DATASETS

    summaries = [
        TaskSummary(
            f"reasoning_gym:{name}",
            ", ".join(f"{key}={text}" for key, text in parameter_defaults(name).items()),
        )
        for name in sorted(DATASETS)
    ]
    return [*summaries, TaskSummary("jsonl:PATH", "one object a line: prompt or messages, answer")]


def _refuse_for_jsonl(args: Mapping[str, Any], answer_tag: str | None) -> None:
    if args:
        raise InputError(
            f"a jsonl task takes no task_args, got {', '.join(sorted(args))}; remove them"
        )
    if answer_tag is not None:
        raise InputError(
            f"answer_tag={answer_tag!r} tells a verifier where to look, and a jsonl task has none; "
            "remove it and read the tag in your reward function"
        )
