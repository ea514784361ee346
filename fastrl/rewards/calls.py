"""What a pool asks of its workers, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple


class Settings(NamedTuple):
    """All that a supervisor and its workers are told, once."""

    specs: tuple[str, ...]
    load_task: bytes | None  # a pickled function without arguments; None where no reward needs it
    num_workers: int
    timeout_s: float  # a call
    load_seconds: float  # for a worker's imports of the user's modules


class Call(NamedTuple):
    """Completions for one reward, each known by a ticket, as columns: they are cheap to send."""

    reward: int  # position among the rewards
    is_together: bool  # all in one call of the function, or each in a call of its own
    tickets: tuple[int, ...]
    examples: tuple[bytes, ...]  # pickled; one object for all completions of a prompt
    texts: tuple[str, ...]
    completion_ids: tuple[list[int], ...]  # empty lists for built-in rewards

    @property
    def num_calls(self) -> int:
        """How often the function will be called."""
        return 1 if self.is_together else len(self.tickets)

    def rows(self, start: int, stop: int | None = None) -> Call:
        """Some of the completions."""
        kept = slice(start, stop)
        return self._replace(
            tickets=self.tickets[kept],
            examples=self.examples[kept],
            texts=self.texts[kept],
            completion_ids=self.completion_ids[kept],
        )


def joined(calls: Sequence[Call], *, is_together: bool) -> Call:
    """The completions of several calls of one reward, in their order."""
    return Call(
        calls[0].reward,
        is_together,
        tickets=tuple(chain.from_iterable(call.tickets for call in calls)),
        examples=tuple(chain.from_iterable(call.examples for call in calls)),
        texts=tuple(chain.from_iterable(call.texts for call in calls)),
        completion_ids=tuple(chain.from_iterable(call.completion_ids for call in calls)),
    )


class Lost(NamedTuple):
    """What a worker that is no more leaves."""

    again: list[Call]  # for others to do
    guilty: tuple[int, ...]  # tickets of the call it did not survive, none or one


def lost(calls: Sequence[Call], num_answered: int, current: int) -> Lost:
    """What is left of a batch, of which `num_answered` completions were answered, in order.

    current: the first completion of the call that was being made, counted over the batch; < 0 where
    none was. A call of several completions is repeated with each alone.
    """
    again: list[Call] = []
    guilty: tuple[int, ...] = ()
    start = 0
    for call in calls:
        size = len(call.tickets)
        first, culprit = max(num_answered - start, 0), current - start
        start += size
        if first >= size:
            continue
        if not first <= culprit < size:
            again.append(call.rows(first))
        elif call.is_together and size > 1:
            again.append(call._replace(is_together=False))
        else:
            guilty = (call.tickets[culprit],)
            again += [call.rows(first, culprit), call.rows(culprit + 1)]
    return Lost([call for call in again if call.tickets], guilty)


class Failure(NamedTuple):
    """An exception as text, for the process that can tell the user."""

    message: str
    traceback: str
    is_input_error: bool


class Answer(NamedTuple):
    """What became of some completions: scores, or one of the three ways to fail."""

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
