"""Who is under way when in a call of the native engine, with completions as long as they may be.

The engine's own room and cohorts decide, as in `fastrl.rollout.native`; only the model with its
keys and values is missing, and steps between which nothing is decided are made at once.

Legend: P prompts, G completions of a prompt, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastrl.policy import Policy
from fastrl.rollout.cohort import Cohort
from fastrl.rollout.decoder import PackedDecoder
from fastrl.rollout.requests import Request
from fastrl.rollout.room import Room


class Call(NamedTuple):
    """What one call of an engine is asked for."""

    num_prompts: int
    num_generations: int
    prompt_length: int
    completion_length: int

    @property
    def num_rows(self) -> int:
        """Completions."""
        return self.num_prompts * self.num_generations


class Moment(NamedTuple):
    """One that may be the highest."""

    kind: Literal["admit", "grow", "step"]
    num_tokens: int
    """That there are keys and values for once it is over, drawn or not."""
    num_prompts: int
    """Those that are admitted, or all that are under way."""
    num_rows: int
    prompt_length: int
    """Of the longest of them; with what had been drawn of it, where it starts again."""
    columns: int
    """Of the rows' own keys and values, where most."""
    num_copied: int = 0
    """Tokens whose values are there three times while the last layer grows."""
    is_first: bool = False
    """Whether it begins the call."""


class _Bookkeeper(PackedDecoder):
    """Cohorts without a model: what there is memory for, and nothing in it."""

    def __init__(self, policy: Policy, call: Call) -> None:
        super().__init__(policy, call.completion_length)
        self.call = call

    def admit(self, requests: Sequence[Request]) -> Tensor:
        """Only the cohort."""
        cohort = Cohort(
            [request.length for request in requests],
            [len(request.rows) for request in requests],
            max_new_tokens=self.max_new_tokens,
            device=torch.device("cpu"),
        )
        self.cohorts.append(cohort)
        return torch.zeros(0)

    @property
    def num_rows(self) -> int:
        """That go on."""
        return sum(len(cohort.active) for cohort in self.cohorts)

    @property
    def due(self) -> list[Cohort]:
        """Cohorts that the next step needs memory for."""
        return [cohort for cohort in self.cohorts if cohort.is_full]

    def moment(self, kind: Literal["grow", "step"], num_copied: int = 0) -> Moment:
        """Of all that is under way."""
        return Moment(
            kind,
            self.num_tokens,
            sum(len(cohort.prefix_lengths) for cohort in self.cohorts),
            self.num_rows,
            max(cohort.longest for cohort in self.cohorts),
            max(cohort.capacity for cohort in self.cohorts),
            num_copied,
        )

    def skip(self, *, is_one: bool) -> None:
        """One step, or all until a cohort is full or has ended; those that have ended leave."""
        ends = (min(x.capacity, self._last(x)) - x.num_new for x in self.cohorts)
        num_steps = 1 if is_one else max(min(ends), 1)
        for cohort in self.cohorts:
            cohort.num_new += num_steps
        self.cohorts = [cohort for cohort in self.cohorts if cohort.num_new < self._last(cohort)]

    def _last(self, cohort: Cohort) -> int:
        """Steps of a cohort; the token drawn last needs no keys and values."""
        num_drawn = cohort.longest - self.call.prompt_length  # before it started again
        return self.call.completion_length - num_drawn - 1


def moments(policy: Policy, room: Room, call: Call) -> Iterator[Moment]:
    """Of the call, in their order."""
    decoder = _Bookkeeper(policy, call)
    ids = torch.zeros(call.prompt_length, dtype=torch.int64)
    requests = [
        Request(ids, tuple(range(p * call.num_generations, (p + 1) * call.num_generations)))
        for p in range(call.num_prompts)
    ]
    waiting = room.fitted(requests, call.num_generations)
    is_first = True
    while waiting or decoder.cohorts:
        num_new = room.admitted(waiting, decoder)
        if num_new:
            new, waiting = waiting[:num_new], waiting[num_new:]
            decoder.admit(new)
            yield _admitted(new, decoder, is_first)
            is_first = False
            if call.completion_length == 1:
                decoder.cohorts = []
            continue
        while decoder.num_rows > 1 and room.is_short(decoder):
            waiting = sorted([*_stopped(decoder), *waiting], key=lambda request: -request.length)
        due = decoder.due
        if due:
            num_copied = len(due[-1].active) * due[-1].num_new
            decoder.grow()
            yield decoder.moment("grow", num_copied)
        yield decoder.moment("step")
        decoder.skip(is_one=bool(due))  # what has grown or stopped decides who starts next


def _admitted(new: Sequence[Request], decoder: _Bookkeeper, is_first: bool) -> Moment:
    return Moment(
        "admit",
        decoder.num_tokens,
        len(new),
        sum(len(request.rows) for request in new),
        new[0].length,
        decoder.cohorts[-1].capacity,
        is_first=is_first,
    )


def _stopped(decoder: _Bookkeeper) -> list[Request]:
    """The younger half of the rows as requests to go on with; each has drawn its own tokens."""
    num_rows = decoder.num_rows
    goes_on = torch.arange(num_rows) < num_rows // 2
    found, start = [], 0
    for cohort in decoder.cohorts:
        stop = start + len(cohort.active)
        num_stopped = int((~goes_on[start:stop]).sum())
        ids = torch.zeros(cohort.longest + cohort.num_new + 1, dtype=torch.int64)
        found += [Request(ids, (0,)) for _ in range(num_stopped)]
        start = stop
    decoder.keep(goes_on, give_back=True)
    return found
