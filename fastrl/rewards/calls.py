"""What a pool asks of its workers, and what they answer."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """All that a supervisor and its workers are told, once."""

    specs: tuple[str, ...]
    load_task: bytes | None  # a pickled function without arguments; None where no reward needs it
    num_workers: int
    timeout_s: float  # a call
    load_seconds: float  # for a worker's imports of the user's modules


class Call(NamedTuple):
    """One call of one reward with one or more completions, each known by a ticket."""

    reward: int  # position among the rewards
    tickets: tuple[int, ...]
    examples: tuple[bytes, ...]  # pickled; one object for all completions of a prompt
    texts: tuple[str, ...]
    completion_ids: tuple[list[int], ...]  # empty lists for built-in rewards

    def parts(self) -> list[Call]:
        """One call per completion."""
        columns = zip(self.tickets, self.examples, self.texts, self.completion_ids, strict=True)
        return [Call(self.reward, (a,), (b,), (c,), (d,)) for a, b, c, d in columns]


class Failure(NamedTuple):
    """An exception as text, for the process that can tell the user."""

    message: str
    traceback: str
    is_input_error: bool


class Answer(NamedTuple):
    """What became of a call: scores, or one of the three ways to fail."""

    tickets: tuple[int, ...]
    scores: tuple[float | None, ...]  # of each ticket; None where the reward does not apply
    ended: str = ""  # "timeout" or "crash" where the process that made the call is no more
    failure: Failure | None = None  # where the reward raised


class Ready(NamedTuple):
    """The rewards are loaded."""

    is_deterministic: tuple[bool, ...]


class Unloadable(NamedTuple):
    """The rewards cannot be loaded."""

    failure: Failure
