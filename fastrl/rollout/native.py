"""Sampling on the training weights: each distinct prompt encoded once, ended rows leave at once.

Legend: P prompts, G num_generations, B = P*G completions, R rows that go on, D hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.integrations.decoding import decoding, has_state
from fastrl.integrations.folding import folded_adapters
from fastrl.policy import Policy
from fastrl.rollout import OnCompletion, Sampling
from fastrl.rollout.cached import CachedDecoder
from fastrl.rollout.decoder import Decoder, PackedDecoder, bytes_per_token
from fastrl.rollout.draws import Drawing
from fastrl.rollout.graphed import GraphedDecoder
from fastrl.rollout.randomness import completion_keys
from fastrl.rollout.requests import Request, grouped
from fastrl.rollout.table import Rows, Table
from fastrl.types import Prompts, Rollouts

GIB = 2**30


class NativeEngine:
    """Decodes with the model that is trained: no second copy of weights, nothing to synchronise.

    kv_cache_gib: the most memory that keys and values may take; prompts wait for room. None: all
    prompts of a call at once. fold_adapters: sample with adapters folded into the weights, which
    get their own bits back; one product for three, for a copy of the adapted weights. cuda_graphs:
    replay steps instead of launching their kernels one by one; needs a GPU and is untested on one.
    """

    shares_weights = True

    def __init__(
        self, policy: Policy, *, kv_cache_gib: float | None = None, fold_adapters: bool = False,
        cuda_graphs: bool = False,
    ) -> None:  # fmt: skip
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
        if cuda_graphs and (policy.device.type != "cuda" or self.has_state):
            raise InputError(
                "cuda_graphs needs a model of attention layers on a GPU, got "
                f"{type(policy.model).__name__} on {policy.device}; remove it"
            )
        self.fold_adapters = fold_adapters
        self.cuda_graphs = cuda_graphs
        self.peak_kv_bytes = 0
        """Most memory that keys and values took in the last call."""

    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts:  # fmt: skip
        """See `Engine.generate`; a completion does not depend on what else is in the batch.

        Its random numbers belong to `generator`, its prompt and g; its logits are those of its own
        tokens, up to the rounding of matrix products of another size.
        """
        return self.advance(prompts, sampling, generator, on_completion=on_completion)

    @torch.no_grad()
    def advance(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator, *,
        started: Rollouts | None = None, max_tokens: int | None = None,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts:  # fmt: skip
        """Go on with completions of the same prompts, for so many tokens in all.

        started: what an earlier call returned, its log-probabilities included, which stay what they
        were. max_tokens: completions that have not ended by then are returned as they are: neither
        finished nor of max_completion_length. None: until all have ended.
        """
        G, C = sampling.num_generations, sampling.max_completion_length
        table = self.new_table(len(prompts) * G, C)
        if started is not None:
            table.start(started)
        self._check_positions(prompts, C)
        room = self._room(C)
        requests = room.fitted(_requests(prompts, table, G), G)
        keys = completion_keys(prompts, G, generator)
        model = self.policy.model
        folded = folded_adapters(model) if self.fold_adapters else nullcontext()
        with evaluating(model), folded, self.policy.autocast():
            drawing = Drawing(self.policy, sampling, keys, table, prompts)
            loop = _Loop(drawing, room, max_tokens, on_completion)
            if self.has_state:
                loop.complete(CachedDecoder(self.policy), requests)
            else:
                decoder = self._decoder(C)
                with decoding(model, decoder):
                    loop.complete(decoder, requests)
                self.peak_kv_bytes = decoder.peak_bytes
        return table.rollouts(prompts, is_exact=sampling.is_exact)

    def new_table(self, num_rows: int, num_columns: int) -> Table:
        """Where a call writes what it draws, which decides who goes on."""
        return Table(num_rows, num_columns, self.policy.device)

    def _decoder(self, max_new_tokens: int) -> PackedDecoder:
        if self.cuda_graphs:
            return GraphedDecoder(self.policy, max_new_tokens, capture=True)
        return PackedDecoder(self.policy, max_new_tokens)

    def check(self, max_prompt_length: int, sampling: Sampling) -> None:
        """Raise InputError where a prompt of that length with its completions finds no room."""
        ids = torch.zeros(max_prompt_length, dtype=torch.int64)
        rows = tuple(range(sampling.num_generations))
        room = self._room(sampling.max_completion_length)
        room.fitted([Request(ids, rows)], len(rows))

    def _room(self, max_new_tokens: int) -> Room:
        if self.kv_cache_gib is None:
            return Room(None, max_new_tokens, 0)
        with torch.no_grad(), evaluating(self.policy.model), self.policy.autocast():
            of_token = bytes_per_token(self.policy)
        return Room(int(self.kv_cache_gib * GIB / of_token), max_new_tokens, of_token)

    def _check_positions(self, prompts: Prompts, max_new_tokens: int) -> None:
        config = self.policy.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        needed = max(map(len, prompts.token_ids)) + max_new_tokens
        if positions and needed > positions:
            raise InputError(
                f"a prompt of {needed - max_new_tokens} tokens and max_completion_length are "
                f"{needed} tokens, but the model has {positions} positions; lower either"
            )


class Room(NamedTuple):
    """How many tokens' keys and values there is memory for."""

    num_tokens: int | None
    max_new_tokens: int
    bytes_per_token: int

    def fitted(self, requests: Sequence[Request], num_generations: int) -> list[Request]:
        """The requests in parts that there is room for, each of a group at least."""
        if self.num_tokens is None:
            return list(requests)
        found = []
        for request in requests:
            group = request.rows[:num_generations]
            needed = self.needed([request._replace(rows=group)])
            if needed > self.num_tokens:
                raise InputError(
                    "kv_cache_gib must hold one prompt with its completions, at least "
                    f"{needed * self.bytes_per_token / GIB:.4g} GiB, but there is room for "
                    f"{self.num_tokens} tokens instead of {needed}; raise it, or lower "
                    "num_generations or max_completion_length"
                )
            most = (self.num_tokens - request.length) // self.max_new_tokens
            for start in range(0, len(request.rows), most):
                found.append(request._replace(rows=request.rows[start : start + most]))
        return found

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


class _Loop:
    """Decodes step by step; requests start in their order, as soon as there is room."""

    def __init__(
        self, drawing: Drawing, room: Room, max_tokens: int | None,
        on_completion: OnCompletion | None,
    ) -> None:  # fmt: skip
        self.drawing = drawing
        self.room = room
        self.max_tokens = max_tokens
        self.on_completion = on_completion

    def complete(self, decoder: Decoder, requests: Sequence[Request]) -> None:
        """Until every completion has ended, or until max_tokens have been drawn."""
        drawing, waiting, num_drawn = self.drawing, list(requests), 0
        rows: Rows = np.zeros(0, dtype=np.int64)
        tokens = drawing.table.ids.new_zeros(0)
        while (waiting or len(rows)) and (self.max_tokens is None or num_drawn < self.max_tokens):
            num_new = self.room.admitted(waiting, decoder)
            if num_new:
                new, waiting = waiting[:num_new], waiting[num_new:]
                hidden = decoder.admit(new)
                added = np.array([row for request in new for row in request.rows], dtype=np.int64)
                first = drawing.from_hidden(hidden, added)
                rows, tokens = np.concatenate([rows, added]), torch.cat([tokens, first])
                num_drawn += len(added)
            else:
                tokens = drawing.from_hidden(decoder.step(tokens), rows)
                num_drawn += len(rows)
            rows, tokens = self._ended(decoder, rows, tokens)

    def _ended(self, decoder: Decoder, rows: Rows, tokens: Tensor) -> tuple[Rows, Tensor]:
        """Rows that have ended leave; the others with their last tokens."""
        goes_on = self.drawing.table.goes_on[rows]
        if goes_on.all():
            return rows, tokens
        if self.on_completion is not None:
            for row in rows[~goes_on].tolist():
                self.on_completion(row, self.drawing.table.completion(row))
        kept = torch.from_numpy(goes_on).to(tokens.device)
        decoder.keep(kept)
        return rows[goes_on], tokens[kept]


def _requests(prompts: Prompts, table: Table, num_generations: int) -> list[Request]:
    """Rows that go on behind equal tokens are one request."""
    prefixes, rows = [], []
    for row in np.flatnonzero(table.goes_on).tolist():
        prompt = prompts.token_ids[row // num_generations]
        started = table.completion(row)
        prefixes.append(torch.cat([prompt.cpu(), started]) if len(started) else prompt)
        rows.append((row,))
    return grouped(prefixes, rows)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode within the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
