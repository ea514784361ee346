"""Rewards in processes of their own, each call under a hard time limit.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from fastrl.errors import InputError
from fastrl.rewards.cache import ScoreCache
from fastrl.rewards.calls import Call, Failure, Ready, Settings, Unloadable
from fastrl.rewards.load import is_user_function, named_weights
from fastrl.rewards.round import Round, Score
from fastrl.rewards.score import examples_of, weighted_total
from fastrl.rewards.supervisor_process import SupervisorProcess
from fastrl.tasks import Task
from fastrl.tasks.prompt import prompt_start
from fastrl.types import Example, Rewards, Rollouts, StepMetrics

LOAD_SECONDS = 300.0
"""How long the imports of a user's file may take, which are no call."""

QUICK = ("task", "exact")
"""Rewards of microseconds, which wait for each other: a message would take longer than the call."""
QUICK_CALLS = 64
QUICK_SECONDS = 0.01


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
        is_deterministic = self._await_ready()
        current = self._round
        pickled = current.add(row, example)
        prompt = row // num_generations
        current.arrived[prompt] = current.arrived.get(prompt, 0) + 1
        is_complete = current.arrived[prompt] == num_generations
        calls = []
        for reward, spec in enumerate(self._specs):
            ids = list(completion_ids) if is_user_function(spec) else []
            score, key = Score(reward, row), None
            if is_deterministic[reward]:
                key = current.new_key(score, self._cache, pickled.digest, text, ids)
            if key is not None or not is_deterministic[reward]:
                current.ask(self._next_ticket, score, key)
                one = (self._next_ticket,), (pickled.data,), (text,), (ids,)
                self._next_ticket += 1
                if is_user_function(spec):
                    group = current.groups.setdefault((reward, prompt), {})
                    group[row] = Call(reward, True, *one)
                elif spec in QUICK:
                    current.quick.setdefault(reward, []).append(Call(reward, False, *one))
                else:
                    calls.append(Call(reward, False, *one))
            if is_complete:
                calls += current.pop_group(reward, prompt)
        self._send(calls)

    def collect(self) -> Rewards:
        """The rewards of all rows submitted since the last collect, 0 .. B-1, in their order."""
        started = time.perf_counter()
        current = self._round
        assert sorted(current.examples) == list(range(len(current.examples))), "rows are missing"
        try:
            # Prompts with fewer completions than was said.
            groups = [current.pop_group(*which) for which in list(current.groups)]
            self._send([call for group in groups for call in group], is_last=True)
            while current.asked:
                self._receive()
        finally:
            self._round = Round()
        self._metrics = current.metrics(time.perf_counter() - started)
        self._raise_first(current)
        examples = [current.examples[row] for row in range(len(current.examples))]
        scores = {
            name: [current.scores[Score(reward, row)] for row in range(len(examples))]
            for reward, (name, _) in enumerate(self._names)
        }
        failed = frozenset(row for _, row in current.ended)
        return weighted_total(examples, scores, [x.weight for x in self._names], failed=failed)

    def forget(self) -> None:
        """Begin a new round; what is on its way to this one is nobody's when it comes."""
        for key in self._round.new_keys:
            self._cache.drop(key)
        self._round = Round()

    def score(self, rollouts: Rollouts, texts: Sequence[str]) -> Rewards:
        """What score_completions returns; rows that were submitted already are only waited for."""
        num_generations = rollouts.num_generations
        for row, example in enumerate(examples_of(rollouts, texts)):
            if row not in self._round.examples:
                ids = rollouts.completion_ids[row].tolist()
                self.submit(row, example, texts[row], ids, num_generations=num_generations)
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

    def _send(self, calls: list[Call], *, is_last: bool = False) -> None:
        """Calls, and the quick ones once they are many, have waited or are the last."""
        current, now = self._round, time.monotonic()
        num_quick = sum(map(len, current.quick.values()))
        if is_last or num_quick >= QUICK_CALLS or now > current.quick_sent + QUICK_SECONDS:
            calls = calls + current.pop_quick(now)
        if calls:
            self._supervisor.send(calls)

    def _await_ready(self) -> tuple[bool, ...]:
        """Of each reward, whether it is deterministic, which its worker knows."""
        while self._is_deterministic is None:
            self._receive()
        return self._is_deterministic

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
                    self._round.enter(answer, self._cache)

    def _raise_first(self, current: Round) -> None:
        """The exception that a single process would have met first, whatever the timing was."""
        if current.failures:
            first = min(current.failures)
            what = f"the reward {self._specs[first.reward]!r} failed"
            raise _exception(current.failures[first], what)


def _exception(failure: Failure, what: str) -> Exception:
    """What was raised in another process, to be raised in this one."""
    if not failure.is_input_error:
        return RuntimeError(f"{what} in its own process:\n{failure.traceback}")
    error = InputError(failure.message)
    error.add_note(failure.traceback)
    return error
