"""Sampling on the training weights: each distinct prompt encoded once, ended rows leave at once.

Legend: P prompts, G num_generations, B = P*G completions, R rows that go on, D hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from fastrl.errors import InputError
from fastrl.integrations.decoding import decoding, has_state
from fastrl.policy import Policy
from fastrl.rollout import OnCompletion, Sampling
from fastrl.rollout.cached import CachedDecoder
from fastrl.rollout.decoder import Decoder, PackedDecoder, bytes_per_token
from fastrl.rollout.draws import Drawing
from fastrl.rollout.randomness import completion_keys
from fastrl.rollout.requests import Request, grouped
from fastrl.rollout.table import Rows, Table
from fastrl.types import Prompts, Rollouts

GIB = 2**30


class NativeEngine:
    """Decodes with the model that is trained: no second copy of weights, nothing to synchronise.

    kv_cache_gib: the most memory that keys and values may take; prompts wait for room. None: all
    prompts of a call at once.
    """

    shares_weights = True

    def __init__(self, policy: Policy, *, kv_cache_gib: float | None = None) -> None:
        self.has_state = has_state(policy.model)
        if self.has_state and kv_cache_gib is not None:
            raise InputError(
                "kv_cache_gib bounds keys and values, but this model keeps other states too; "
                "remove it"
            )
        if kv_cache_gib is not None and not kv_cache_gib > 0:
            raise InputError(f"kv_cache_gib must be positive, got {kv_cache_gib}")
        self.policy = policy
        self.kv_cache_gib = kv_cache_gib
        self.peak_kv_bytes = 0
        """Most memory that keys and values took in the last call."""

    @torch.no_grad()
    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts:  # fmt: skip
        """See `Engine.generate`; a completion does not depend on what else is in the batch.

        Its random numbers belong to `generator`, its prompt and g; its logits are those of its own
        tokens, up to the rounding of matrix products of another size.
        """
        G, C = sampling.num_generations, sampling.max_completion_length
        rows = [range(p * G, (p + 1) * G) for p in range(len(prompts))]
        requests = grouped(prompts.token_ids, rows)
        table = Table(len(prompts) * G, C, self.policy.device)
        keys = completion_keys(prompts, G, generator)
        drawing = Drawing(self.policy, sampling, keys, table, prompts)
        with evaluating(self.policy.model), self.policy.autocast():
            room = self._room(requests, C)
            decoder: Decoder
            if self.has_state:
                decoder = CachedDecoder(self.policy)
                complete(decoder, requests, drawing, room, on_completion)
            else:
                decoder = packed = PackedDecoder(self.policy, C)
                with decoding(self.policy.model, packed):
                    complete(packed, requests, drawing, room, on_completion)
        self.peak_kv_bytes = decoder.peak_bytes
        return table.rollouts(prompts, is_exact=sampling.is_exact)

    def _room(self, requests: Sequence[Request], max_new_tokens: int) -> Room:
        """The budget in tokens; every request fits in it alone."""
        if self.kv_cache_gib is None:
            return Room(None, max_new_tokens)
        of_token = bytes_per_token(self.policy)
        room = Room(int(self.kv_cache_gib * GIB / of_token), max_new_tokens)
        needed = max(room.needed([request]) for request in requests)
        assert room.num_tokens is not None
        if needed > room.num_tokens:
            raise InputError(
                f"kv_cache_gib must hold one prompt with its completions, at least "
                f"{needed * of_token / GIB:.4g} GiB, got {self.kv_cache_gib:g}; raise it, or lower "
                "num_generations or max_completion_length"
            )
        return room


class Room(NamedTuple):
    """How many tokens' keys and values there is memory for."""

    num_tokens: int | None
    max_new_tokens: int

    def needed(self, requests: Sequence[Request]) -> int:
        """Tokens that a cohort of these has memory for."""
        num_rows = sum(len(request.rows) for request in requests)
        return len(requests) * requests[0].length + num_rows * self.max_new_tokens

    def admitted(self, requests: Sequence[Request], decoder: Decoder) -> int:
        """How many of the waiting requests, from the first, start now as one cohort."""
        if not requests:
            return 0
        num = decoder.admissible(requests)
        while (
            num and self.num_tokens is not None
            and decoder.num_tokens + self.needed(requests[:num]) > self.num_tokens
        ):  # fmt: skip
            num -= 1
        return num


def complete(
    decoder: Decoder, requests: Sequence[Request], drawing: Drawing, room: Room,
    on_completion: OnCompletion | None,
) -> None:  # fmt: skip
    """Decode until every completion has ended; requests start in their order as there is room."""
    rows: Rows = np.zeros(0, dtype=np.int64)
    tokens = drawing.table.ids.new_zeros(0)
    waiting = list(requests)
    while waiting or len(rows):
        num_new = room.admitted(waiting, decoder)
        if num_new:
            new, waiting = waiting[:num_new], waiting[num_new:]
            hidden = decoder.admit(new)
            old = torch.ones(len(rows), dtype=torch.bool)
            added = np.array([row for request in new for row in request.rows], dtype=np.int64)
            first, goes_on = drawing.from_hidden(hidden, added)
            rows, tokens = np.concatenate([rows, added]), torch.cat([tokens, first])
            goes_on = np.concatenate([old.numpy(), goes_on])
        else:
            tokens, goes_on = drawing.from_hidden(decoder.step(tokens), rows)
        if not goes_on.all():
            if on_completion is not None:
                for row in rows[~goes_on].tolist():
                    on_completion(row, drawing.table.completion(row))
            kept = torch.from_numpy(goes_on).to(tokens.device)
            decoder.keep(kept)
            rows, tokens = rows[goes_on], tokens[kept]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode within the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
