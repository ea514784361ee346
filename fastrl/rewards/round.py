"""The completions that a pool was given since it was last asked for rewards."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import NamedTuple

from fastrl.errors import InputError
from fastrl.example import Example
from fastrl.rewards.cache import ScoreCache, hash_of, score_key
from fastrl.rewards.calls import Answer, Call, Failure, joined
from fastrl.tasks.prompt import prompt_start
from fastrl.types import StepMetrics


class Score(NamedTuple):
    """Which score: that of a reward, by position, for a completion, by row."""

    reward: int
    row: int


class Asked(NamedTuple):
    """A score that was asked for."""

    reward: int
    rows: list[int]  # every completion it is the score of
    key: bytes | None  # under which the cache will keep it; None where it will not


class Pickled(NamedTuple):
    """An example as it travels."""

    data: bytes
    digest: bytes


@dataclass
class Round:
    """What was asked, what was answered, and the calls that wait to be sent together."""

    examples: dict[int, Example] = field(default_factory=dict)  # by row
    scores: dict[Score, float | None] = field(default_factory=dict)
    ended: dict[Score, str] = field(default_factory=dict)  # "timeout" or "crash", of those without
    failures: dict[Score, Failure] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)  # by ticket
    num_cache_hits: int = 0
    new_keys: list[bytes] = field(default_factory=list)  # that the cache keeps since this round
    # Calls of users' functions that wait for the prompt's other completions: by reward and prompt,
    # then by row.
    groups: dict[tuple[int, int], dict[int, Call]] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)  # completions of each prompt so far
    quick: dict[int, list[Call]] = field(default_factory=dict)  # calls to send in one, by reward
    quick_sent: float = 0.0  # when that was done last
    _pickled: dict[int, Pickled] = field(default_factory=dict)  # by id of an example in `examples`
    _tickets: dict[bytes, int] = field(default_factory=dict)  # of what the cache will keep

    def add(self, row: int, example: Example) -> Pickled:
        """A new completion, which answers the prompt of `example`."""
        assert row not in self.examples, f"row {row} was submitted before"
        self.examples[row] = example
        if id(example) not in self._pickled:
            try:
                data = pickle.dumps(example, protocol=pickle.HIGHEST_PROTOCOL)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise InputError(
                    f"the example with the prompt {prompt_start(example.prompt)} cannot be sent to "
                    f"a reward worker: {error}; let its columns hold plain data"
                ) from error
            self._pickled[id(example)] = Pickled(data, hash_of(data))
        return self._pickled[id(example)]

    def new_key(
        self, score: Score, cache: ScoreCache, digest: bytes, text: str, ids: list[int]
    ) -> bytes | None:
        """The key of a score that must be computed; None where it is there or on its way."""
        key = score_key(score.reward, digest, text, ids)
        if key in cache:
            self.scores[score] = cache.get(key)
        elif key in self._tickets:
            self.asked[self._tickets[key]].rows.append(score.row)
        else:
            return key
        self.num_cache_hits += 1
        return None

    def ask(self, ticket: int, score: Score, key: bytes | None) -> None:
        """Wait for a score under this ticket."""
        self.asked[ticket] = Asked(score.reward, [score.row], key)
        if key is not None:
            self._tickets[key] = ticket

    def enter(self, answer: Answer, cache: ScoreCache) -> None:
        """An answer for every row that waits for it; one to an earlier round is nobody's."""
        for position, ticket in enumerate(answer.tickets):
            asked = self.asked.pop(ticket, None)
            if asked is None:
                continue
            score = answer.scores[position] if answer.failure is None else None
            if asked.key is not None:
                del self._tickets[asked.key]
                if answer.failure is None and not answer.ended:
                    cache.put(asked.key, score)
                    self.new_keys.append(asked.key)
            for row in asked.rows:
                which = Score(asked.reward, row)
                self.scores[which] = score
                if answer.ended:
                    self.ended[which] = answer.ended
                if answer.failure is not None:
                    self.failures[which] = answer.failure

    def pop_group(self, reward: int, prompt: int) -> list[Call]:
        """One call for the completions of a prompt, in the order of their rows; none if known."""
        group = self.groups.pop((reward, prompt), {})
        return [joined([group[row] for row in sorted(group)], is_together=True)] if group else []

    def pop_quick(self, now: float) -> list[Call]:
        """What waits of the quick calls, one for each reward."""
        calls = [joined(part, is_together=False) for part in self.quick.values()]
        self.quick, self.quick_sent = {}, now
        return calls

    def metrics(self, seconds: float) -> StepMetrics:
        """Counts of scores that are missing or were known, and the seconds that were waited."""
        ended = list(self.ended.values())
        return {
            "rewards/timeouts": float(ended.count("timeout")),
            "rewards/crashes": float(ended.count("crash")),
            "rewards/cache_hits": float(self.num_cache_hits),
            "time/score_wait": seconds,
        }
