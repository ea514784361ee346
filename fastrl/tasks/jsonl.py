"""Tasks read from a file with one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fastrl.errors import InputError
from fastrl.example import Example, Message
from fastrl.tasks.prompt import example_key, with_system_prompt

KINDS = ("prompt", "messages", "turns")
"""What a record asks; it has one of these keys."""
RESERVED = ("prompts", "completions", "completion_ids")  # what reward functions already receive
EVAL_SIZE = 128
"""Held-out prompts where nothing else is asked for."""
SPLIT, EPOCH = range(2)  # streams of random numbers


class JsonlTask:
    """Prompts of a file, reshuffled every epoch.

    A record has `prompt` (text or chat messages), `messages` (chat; a last assistant message is the
    reference answer) or `turns` (what the user says, message by message, the policy answering each
    before the next), maybe `answer` (of a conversation's last turn), and any other keys, which
    reward functions receive. A key that only some records have is None in the others.
    """

    has_verifier = False

    def __init__(
        self,
        path: str,
        *,
        seed: int,
        eval_size: int | None,
        eval_path: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        self.name = f"jsonl:{path}"
        self._seed = seed
        examples = read_examples(path, system_prompt)
        if eval_path is not None:
            held_out = _first(eval_size, read_examples(eval_path, system_prompt), eval_path)
        else:
            eval_size = EVAL_SIZE if eval_size is None else eval_size
            order = np.random.default_rng([seed, SPLIT]).permutation(len(examples)).tolist()
            kept = max(len(examples) - eval_size, 0)
            held_out = [examples[row] for row in order[kept:]]
        keys = {example_key(example) for example in held_out}
        train = [example for example in examples if example_key(example) not in keys]
        if not train:
            raise InputError(
                f"{path} has {len(examples)} records and holding out {len(held_out)} leaves no "
                "other prompt for training; lower eval_size or add records"
            )
        columns = {key: None for example in examples + held_out for key in example.columns}
        self._train = [_with_columns(example, columns) for example in train]
        self._eval = [_with_columns(example, columns) for example in held_out]
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def train_example(self, index: int) -> Example:
        """Record `index` of the endless sequence of shuffled epochs."""
        epoch, row = divmod(index, len(self._train))
        return self._train[self._order(epoch)[row]]

    def eval_examples(self) -> list[Example]:
        """Records of eval_path, or those taken out of the file."""
        return list(self._eval)

    def known_examples(self) -> list[Example]:
        """Every record, training and held out."""
        return self._train + self._eval

    def score(self, completion: str, example: Example) -> float:
        """Not possible: a file has no verifier."""
        raise InputError(
            f"{self.name} has no verifier; set rewards to 'exact', 'math' or MODULE:FUNCTION"
        )

    def _shuffle(self, epoch: int) -> list[int]:
        generator = np.random.default_rng([self._seed, EPOCH, epoch])
        order: list[int] = generator.permutation(len(self._train)).tolist()
        return order


def read_examples(path: str, system_prompt: str | None) -> list[Example]:
    """The records of a file in its order; every mistake is reported as PATH:LINE."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(
            f"cannot read the task file {path}: {error.strerror}; paths are relative to the "
            "current directory"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text, got {error.reason}; convert it") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        example = _example(_record(line, where), where)
        try:
            prompt = with_system_prompt(example.prompt, system_prompt)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        examples.append(replace(example, prompt=prompt))
    if not examples:
        raise InputError(f"{path} is empty; expected one JSON object a line")
    return examples


def _first(size: int | None, examples: list[Example], path: str) -> list[Example]:
    """As many as asked for, or all."""
    if size is not None and size > len(examples):
        raise InputError(
            f"eval_size={size}, and {path} has {len(examples)} records; lower eval_size, or leave "
            "it out to use them all"
        )
    return examples[:size]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: expected one JSON object a line, got malformed JSON ({error.msg} at column "
            f"{error.colno})"
        ) from error
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half of a surrogate pair, which is no text") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {_kind(record)}")
    return record


def _example(record: dict[str, Any], where: str) -> Example:
    if sum(key in record for key in KINDS) != 1:
        raise InputError(
            f"{where}: expected exactly one of the keys 'prompt', 'messages' and 'turns', got "
            f"{', '.join(map(repr, record)) or 'no key at all'}"
        )
    for key in RESERVED:
        if key in record:
            raise InputError(
                f"{where}: the key {key!r} is reserved for what reward functions receive; rename it"
            )
    columns = {k: v for k, v in record.items() if k not in (*KINDS, "answer")}
    answer = _answer(record.get("answer"), where)
    if "turns" in record:
        first, *later = _turns(record["turns"], where)
        return Example([{"role": "user", "content": first}], answer, columns, tuple(later))
    if "prompt" in record:
        return Example(_prompt(record["prompt"], where), answer, columns)
    messages = _messages(record["messages"], "messages", where)
    if messages[-1]["role"] != "assistant":
        return Example(messages, answer, columns)
    if answer is not None:
        raise InputError(
            f"{where}: both 'answer' and a last assistant message give the reference answer; "
            "remove one of the two"
        )
    if len(messages) == 1:
        raise InputError(f"{where}: 'messages' holds only the answer; expected a user message")
    return Example(messages[:-1], messages[-1]["content"], columns)


def _answer(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: 'answer' must be a string or a number, got {_kind(value)}")
    return str(value)


def _prompt(value: Any, where: str) -> str | list[Message]:
    if isinstance(value, list):
        messages = _messages(value, "prompt", where)
        if messages[-1]["role"] == "assistant":
            raise InputError(
                f"{where}: 'prompt' ends with an assistant message; call the key 'messages' if "
                "that is the reference answer"
            )
        return messages
    if not isinstance(value, str):
        raise InputError(f"{where}: 'prompt' must be a string or messages, got {_kind(value)}")
    if not value.strip():
        raise InputError(f"{where}: 'prompt' is empty; expected some text")
    return value


def _turns(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{where}: 'turns' must be a non-empty list of what the user says, got {_kind(value)}"
        )
    for number, text in enumerate(value, start=1):
        if not isinstance(text, str):
            raise InputError(f"{where}: turn {number} must be a string, got {_kind(text)}")
        if not text.strip():
            raise InputError(f"{where}: turn {number} is empty; expected some text")
    return value


def _messages(value: Any, key: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {key!r} must be a non-empty list, got {_kind(value)}")
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(
                f"{where}: message {position} of {key!r} must have 'role' and 'content', got "
                f"{_kind(message)}"
            )
        for name, text in message.items():
            if not isinstance(text, str):
                raise InputError(
                    f"{where}: {name!r} of message {position} of {key!r} must be a string, got "
                    f"{_kind(text)}"
                )
    if not value[-1]["content"].strip():
        raise InputError(f"{where}: the last message of {key!r} is empty; expected some text")
    return value


def _with_columns(example: Example, columns: dict[str, None]) -> Example:
    return replace(example, columns={**columns, **example.columns})


def _kind(value: Any) -> str:
    """The type of a JSON value in JSON's own words, with the keys of an object."""
    if isinstance(value, dict):
        return f"an object with the keys {sorted(value)}"
    names = {str: "a string", bool: "a boolean", list: "a list", type(None): "null"}
    return f"{names.get(type(value), 'a number')} ({json.dumps(value)[:40]})"
