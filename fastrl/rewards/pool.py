"""Rewards in processes of their own, each call under a hard time limit.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from fastrl.errors import InputError
from fastrl.rewards.cache import ScoreCache, score_key
from fastrl.rewards.calls import Answer, Call, Failure, Ready, Settings, Unloadable
from fastrl.rewards.load import is_user_function, named_weights
from fastrl.rewards.score import examples_of, weighted_total
from fastrl.rewards.supervisor_process import SupervisorProcess
from fastrl.tasks import Task
from fastrl.tasks.prompt import prompt_start
from fastrl.types import Example, Rewards, Rollouts, StepMetrics

LOAD_SECONDS = 300.0
"""How long the imports of a user's file may take, which are no call."""


class Asked(NamedTuple):
    """A score that was asked for."""

    reward: int
    rows: list[int]  # every completion it is the score of
    key: bytes | None  # under which the cache will keep it; None where it will not


@dataclass
class Round:
    """What became of the completions submitted since the last collect."""

    examples: dict[int, Example] = field(default_factory=dict)  # by row
    pickled: dict[int, bytes] = field(default_factory=dict)  # by id of an example in `examples`
    scores: dict[tuple[int, int], float | None] = field(default_factory=dict)  # by reward and row
    ended: dict[tuple[int, int], str] = field(default_factory=dict)  # likewise: timeout or crash
    failures: dict[tuple[int, int], Failure] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)  # by ticket
    tickets: dict[bytes, int] = field(default_factory=dict)  # of what the cache will keep
    # Calls of users' functions that wait for the prompt's other completions: by reward and prompt,
    # then by row.
    groups: dict[tuple[int, int], dict[int, Call]] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)  # completions of each prompt so far
    num_cache_hits: int = 0


class RewardPool:
    """Scores completions while others are still being sampled, whatever the rewards do.

    A call that takes longer than `timeout_s`, or whose process dies, gives no score: the completion
    has NaN in that part, and a total of 0 if no other reward applies to it. Such calls are counted
    in `metrics`. Exceptions of the user's functions are InputErrors, as without a pool.

    A user's function gets all G completions of a prompt in one call, never those of several
    prompts, and calls run in any of the workers: what a function remembers, it remembers in one of
    them. A call of several completions that hangs or crashes is repeated with each alone, so that
    only the guilty one has no score. Scores of the built-in rewards, and of functions with the
    attribute `deterministic = True`, are kept and used again for equal completions of equal
    examples.
    """

    def __init__(
        self,
        specs: Sequence[str],
        weights: Sequence[float] | None,
        load_task: Callable[[], Task] | None,
        *,
        num_workers: int,
        timeout_s: float,
    ) -> None:
        """load_task: can be pickled; called in another process where "task" is one of the rewards.

        num_workers: processes at most; they start when there is work. timeout_s: seconds a call.
        """
        self._names = named_weights(specs, weights)
        if num_workers < 1:
            raise InputError(f"a pool needs at least one worker, got {num_workers}")
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise InputError(f"the time limit of a reward must be > 0 seconds, got {timeout_s}")
        self._specs = tuple(specs)
        needs_task = "task" in specs
        assert load_task is not None or not needs_task, "the reward 'task' comes with a task"
        loader = pickle.dumps(load_task) if needs_task else None
        self._supervisor = SupervisorProcess(
            Settings(self._specs, loader, num_workers, float(timeout_s), LOAD_SECONDS)
        )
        self._timeout_s = timeout_s
        self._is_deterministic: tuple[bool, ...] | None = None  # None until workers are ready
        self._cache = ScoreCache()
        self._round = Round()
        self._next_ticket = 0
        self._metrics: StepMetrics = {}

    @property
    def metrics(self) -> StepMetrics:
        """Calls without a score, scores from the cache, seconds waited: of the last collect."""
        return dict(self._metrics)

    def submit(
        self, row: int, example: Example, text: str, completion_ids: Sequence[int], *,
        num_generations: int,
    ) -> None:  # fmt: skip
        """Have completion `row` of a round scored; it answers prompt row // num_generations.

        A row comes once a round. Nothing is waited for, save that the first call of all waits for
        the rewards to load.
        """
        self._await_ready()
        current = self._round
        assert row not in current.examples, f"row {row} was submitted before"
        current.examples[row] = example
        pickled = self._pickled(example)
        prompt = row // num_generations
        calls = []
        for reward, spec in enumerate(self._specs):
            ids = list(completion_ids) if is_user_function(spec) else []
            ticket = self._ticket(reward, row, pickled, text, ids)
            if ticket is None:
                continue
            call = Call(reward, (ticket,), (pickled,), (text,), (ids,))
            if is_user_function(spec):
                current.groups.setdefault((reward, prompt), {})[row] = call
            else:
                calls.append(call)
        current.arrived[prompt] = current.arrived.get(prompt, 0) + 1
        if current.arrived[prompt] == num_generations:
            groups = [current.groups.pop((r, prompt), {}) for r in range(len(self._specs))]
            calls += [_together(group) for group in groups if group]
        if calls:
            self._supervisor.send(calls)

    def collect(self) -> Rewards:
        """The rewards of all rows submitted since the last collect, 0 .. B-1, in their order."""
        started = time.perf_counter()
        current = self._round
        assert sorted(current.examples) == list(range(len(current.examples))), "rows are missing"
        try:
            if current.groups:  # of prompts with fewer completions than was said
                self._supervisor.send([_together(group) for group in current.groups.values()])
            while current.asked:
                self._receive()
        finally:
            self._round = Round()
        self._metrics = self._counted(current, time.perf_counter() - started)
        self._raise_first(current)
        examples = [current.examples[row] for row in range(len(current.examples))]
        scores = {
            name: [current.scores[reward, row] for row in range(len(examples))]
            for reward, (name, _) in enumerate(self._names)
        }
        failed = frozenset(row for _, row in current.ended)
        return weighted_total(examples, scores, [x.weight for x in self._names], failed=failed)

    def score(self, rollouts: Rollouts, texts: Sequence[str]) -> Rewards:
        """What score_completions returns, for completions that are all there."""
        for row, example in enumerate(examples_of(rollouts, texts)):
            ids = rollouts.completion_ids[row].tolist()
            self.submit(row, example, texts[row], ids, num_generations=rollouts.num_generations)
        return self.collect()

    def check(self, example: Example) -> None:
        """Score an example's reference answer, so that a broken reward fails before training."""
        # One made-up token: a function may divide by the length of a completion, which is never 0.
        self.submit(0, example, example.answer or "", [0], num_generations=1)
        ended = self._round.ended
        self.collect()
        for (reward, _), how in sorted(ended.items()):
            what = f"took over {self._timeout_s:g} s" if how == "timeout" else "ended its process"
            raise InputError(
                f"the reward {self._specs[reward]!r} {what} on the reference answer of the prompt "
                f"{prompt_start(example.prompt)}; mend it or raise the time limit"
            )

    def close(self) -> None:
        """End all processes; also done when the pool or this process is gone."""
        self._supervisor.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def _ticket(
        self, reward: int, row: int, example: bytes, text: str, ids: list[int]
    ) -> int | None:
        """A number for a score that must be computed; None where it is known or on its way."""
        assert self._is_deterministic is not None
        current, key = self._round, None
        if self._is_deterministic[reward]:
            key = score_key(self._specs[reward], example, text, ids)
            if key in self._cache:
                current.scores[reward, row] = self._cache.get(key)
                current.num_cache_hits += 1
                return None
            if key in current.tickets:
                current.asked[current.tickets[key]].rows.append(row)
                current.num_cache_hits += 1
                return None
        ticket = self._next_ticket
        self._next_ticket += 1
        current.asked[ticket] = Asked(reward, [row], key)
        if key is not None:
            current.tickets[key] = ticket
        return ticket

    def _pickled(self, example: Example) -> bytes:
        known = self._round.pickled
        if id(example) not in known:
            try:
                known[id(example)] = pickle.dumps(example, protocol=pickle.HIGHEST_PROTOCOL)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise InputError(
                    f"the example with the prompt {prompt_start(example.prompt)} cannot be sent to "
                    f"a reward worker: {error}; let its columns hold plain data"
                ) from error
        return known[id(example)]

    def _await_ready(self) -> None:
        while self._is_deterministic is None:
            self._receive()

    def _receive(self) -> None:
        is_loading = self._is_deterministic is None
        for message in self._supervisor.receive(is_loading=is_loading):
            if isinstance(message, Ready):
                self._is_deterministic = message.is_deterministic
            elif isinstance(message, Unloadable):
                self.close()
                raise _exception(message.failure, "loading the rewards failed")
            else:
                for answer in message:
                    self._take(answer)

    def _take(self, answer: Answer) -> None:
        """Enter an answer for every row that waits for it; those of an abandoned round are lost."""
        current = self._round
        for position, ticket in enumerate(answer.tickets):
            asked = current.asked.pop(ticket, None)
            if asked is None:
                continue
            if asked.key is not None:
                del current.tickets[asked.key]
            score = answer.scores[position] if answer.failure is None else None
            if asked.key is not None and answer.failure is None and not answer.ended:
                self._cache.put(asked.key, score)
            for row in asked.rows:
                current.scores[asked.reward, row] = score
                if answer.ended:
                    current.ended[asked.reward, row] = answer.ended
                if answer.failure is not None:
                    current.failures[asked.reward, row] = answer.failure

    def _counted(self, current: Round, seconds: float) -> StepMetrics:
        ended = list(current.ended.values())
        return {
            "rewards/timeouts": float(ended.count("timeout")),
            "rewards/crashes": float(ended.count("crash")),
            "rewards/cache_hits": float(current.num_cache_hits),
            "time/score_wait": seconds,
        }

    def _raise_first(self, current: Round) -> None:
        """The exception that a single process would have met first, whatever the timing was."""
        if current.failures:
            reward, row = min(current.failures)
            what = f"the reward {self._specs[reward]!r} failed"
            raise _exception(current.failures[reward, row], what)


def _together(group: Mapping[int, Call]) -> Call:
    """One call for the completions of several, in the order of their rows."""
    calls = [group[row] for row in sorted(group)]
    columns = list(zip(*(call[1:] for call in calls), strict=True))
    tickets, examples, texts, ids = (tuple(x[0] for x in column) for column in columns)
    return Call(calls[0].reward, tickets, examples, texts, ids)


def _exception(failure: Failure, what: str) -> Exception:
    """What was raised in another process, to be raised in this one."""
    if not failure.is_input_error:
        return RuntimeError(f"{what} in its own process:\n{failure.traceback}")
    error = InputError(failure.message)
    error.add_note(failure.traceback)
    return error
