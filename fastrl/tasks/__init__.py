"""Tasks: where prompts come from and, where a task has a verifier, how completions are scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from fastrl.errors import InputError, nearest
from fastrl.example import Example
from fastrl.tasks.jsonl import EVAL_SIZE, JsonlTask
from fastrl.tasks.mixture import MixtureTask, shares_of
from fastrl.tasks.procedural import ProceduralTask, parameter_defaults

KINDS = ["reasoning_gym", "jsonl"]
MIXTURE = "mixture"
PART_KEYS = ("task", "weight", "task_args", "eval_path", "answer_tag", "system_prompt")


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
    eval_size: int | None = None,
    eval_path: str | None = None,
    answer_tag: str | None = None,
    system_prompt: str | None = None,
) -> Task:
    """The task named by "reasoning_gym:NAME" or "jsonl:PATH", or a "mixture" of several.

    args: parameters of a reasoning_gym task; of a mixture, `tasks`: a list of tables with `task`,
    and `weight` (1 unless given), task_args, eval_path, answer_tag and system_prompt of its own.
    seed: >= 0, chooses the examples and their order. eval_size: held-out examples, 0 for
    none; None: 128, or all of eval_path. eval_path: file of a jsonl task whose first examples are
    held out. answer_tag: the verifier sees only the
    text inside the last <tag>...</tag>.
    """
    if spec == MIXTURE:
        return _mixture(
            args, seed=seed, eval_size=eval_size, eval_path=eval_path, answer_tag=answer_tag,
            system_prompt=system_prompt,
        )  # fmt: skip
    kind, separator, name = spec.partition(":")
    if not separator or not name:
        raise InputError(
            f"expected a task like 'reasoning_gym:chain_sum' or 'jsonl:PATH', or 'mixture', "
            f"got {spec!r}"
        )
    if kind not in KINDS:
        raise InputError(f"unknown kind of task {kind!r} in {spec!r}; {nearest(kind, KINDS)}")
    if seed < 0 or (eval_size is not None and eval_size < 0):
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
        eval_size=EVAL_SIZE if eval_size is None else eval_size,
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
    return [
        *summaries,
        TaskSummary("jsonl:PATH", "one object a line: prompt, messages or turns; answer"),
        TaskSummary("mixture", "tasks=[{task, weight, task_args, ...}, ...]"),
    ]


def _mixture(
    args: Mapping[str, Any], *, seed: int, eval_size: int | None, eval_path: str | None,
    answer_tag: str | None, system_prompt: str | None,
) -> MixtureTask:  # fmt: skip
    """The tasks of a mixture; held-out examples are shared out like training prompts."""
    entries = args.get("tasks")
    if set(args) != {"tasks"} or not isinstance(entries, list | tuple):
        raise InputError(
            "a mixture takes one argument, the list tasks (in TOML: [[task_args.tasks]]), got "
            f"{', '.join(sorted(args)) or 'none'}"
        )
    if eval_path is not None:
        raise InputError(
            "eval_path belongs to a task of the mixture; set it in [[task_args.tasks]]"
        )
    for entry in entries:
        if not isinstance(entry, Mapping) or "task" not in entry:
            raise InputError(
                f"a task of a mixture must be a table with the key task, got {entry!r}"
            )
        for key in entry:
            if key not in PART_KEYS:
                raise InputError(f"unknown key {key!r} in a mixture; {nearest(key, [*PART_KEYS])}")
        if entry["task"] == MIXTURE:
            raise InputError("a mixture cannot be a task of a mixture; list its tasks instead")
    weights = [float(entry.get("weight", 1.0)) for entry in entries]
    shares = shares_of(EVAL_SIZE if eval_size is None else eval_size, weights)
    parts = [
        load_task(
            entry["task"], entry.get("task_args", {}), seed=seed,
            eval_size=None if eval_size is None and "eval_path" in entry else share,
            eval_path=entry.get("eval_path"), answer_tag=entry.get("answer_tag", answer_tag),
            system_prompt=entry.get("system_prompt", system_prompt),
        )
        for entry, share in zip(entries, shares, strict=True)
    ]  # fmt: skip
    return MixtureTask(parts, weights)


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
