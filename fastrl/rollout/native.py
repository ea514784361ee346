"""Sampling on the training weights: each distinct prompt encoded once, ended rows leave at once.

Legend: P prompts, G num_generations, B = P*G completions, R rows that go on, D hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.integrations.decoding import decoding, has_state
from fastrl.integrations.folding import folded_adapters
from fastrl.memory.plan import GIB
from fastrl.memory.recovery import Recovery, is_out_of_memory, reason_of
from fastrl.policy import Policy
from fastrl.rollout import OnCompletion, Sampling
from fastrl.rollout.cached import CachedDecoder
from fastrl.rollout.decoder import Decoder, PackedDecoder, bytes_per_token
from fastrl.rollout.draws import Drawing
from fastrl.rollout.graphed import GraphedDecoder
from fastrl.rollout.randomness import completion_keys
from fastrl.rollout.requests import Request, grouped
from fastrl.rollout.room import Room, tokens_in
from fastrl.rollout.table import Rows, Table
from fastrl.types import Prompts, Rollouts


class NativeEngine:
    """Decodes with the model that is trained: no second copy of weights, nothing to synchronise.

    kv_cache_gib: the most memory that keys and values may take; prompts wait for room. None: on a
    GPU what weights and optimizer leave over, on a CPU all prompts of a call at once.
    fold_adapters: sample with adapters folded into the weights, which get their own bits back; one
    product for three, for a copy of the adapted weights. cuda_graphs: replay steps instead of
    launching their kernels one by one; needs a GPU and is untested on one.
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
        self.num_restarts = 0
        """Completions that found no room to grow in it and started again from what they had."""
        self.recovery: Recovery | None = None
        """What a call does that meets the end of memory; None: it fails."""
        self.largest_group = 0
        """Tokens that there is always room for, however little memory is left."""

    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts:  # fmt: skip
        """See `Engine.generate`; a completion does not depend on what else is in the batch.

        Its random numbers belong to `generator`, its prompt and g; its logits are those of its own
        tokens, up to the rounding of matrix products of another size.
        """
        return self.advance(prompts, sampling, generator, on_completion=on_completion)

    def advance(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator, *,
        started: Rollouts | None = None, max_tokens: int | None = None,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts:  # fmt: skip
        """Go on with completions of the same prompts, for so many tokens in all.

        started: what an earlier call returned, its log-probabilities included, which stay what they
        were. max_tokens: completions that have not ended by then are returned as they are: neither
        finished nor of max_completion_length. None: until all have ended.

        With a `recovery`, where memory runs out all of it is sampled again with half the room.
        """
        if self.recovery is None:
            return self._advance(prompts, sampling, generator, started, max_tokens, on_completion)
        state, most = generator.get_state(), _tokens_at_most(prompts, sampling)
        while True:
            generator.set_state(state)
            try:
                return self._advance(
                    prompts, sampling, generator, started, max_tokens, on_completion
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = reason_of(error)
            self.recovery.failed(reason)
            self._halve_room(most)

    @property
    def smallest_kv_cache_gib(self) -> float | None:
        """Below which no halving goes; None for a model that has no such thing."""
        if self.has_state:
            return None
        return (self.largest_group + 0.5) * self._bytes_per_token / GIB

    def _halve_room(self, most: int) -> None:
        """For keys and values: half of what the call that has failed took, or could have taken.

        most: tokens of its completions at their longest.
        """
        if self.has_state or self.recovery is None:
            return  # states have no size a token
        of_token = self._bytes_per_token
        room = self._room(0).num_tokens
        used = self.peak_kv_bytes // of_token or most  # of prompts alone nothing is known yet
        tokens = max(min(used, most, room or most) // 2, self.largest_group)
        gib = (tokens + 0.5) * of_token / GIB  # so that it is as many tokens when it is read
        self.kv_cache_gib = gib if self.kv_cache_gib is None else min(gib, self.kv_cache_gib)
        self.recovery.use_kv_cache(self.kv_cache_gib)

    @torch.no_grad()
    def _advance(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator,
        started: Rollouts | None, max_tokens: int | None, on_completion: OnCompletion | None,
    ) -> Rollouts:  # fmt: skip
        """See `advance`."""
        G, C = sampling.num_generations, sampling.max_completion_length
        self.peak_kv_bytes = 0
        table = self.new_table(len(prompts) * G, C)
        if started is not None:
            table.start(started)
        self._check_positions(prompts, C)
        room = self._room(C)
        requests = room.fitted(_requests(prompts, table, np.flatnonzero(table.goes_on)), G)
        keys = completion_keys(prompts, G, generator)
        model = self.policy.model
        folded = folded_adapters(model) if self.fold_adapters else nullcontext()
        with self.policy.evaluating(), folded, self.policy.autocast():
            drawing = Drawing(self.policy, sampling, keys, table, prompts)
            loop = _Loop(prompts, drawing, room, max_tokens, on_completion)
            if self.has_state:
                loop.complete(CachedDecoder(self.policy), requests)
            else:
                decoder = self._decoder(C)
                try:
                    with decoding(model, decoder):
                        loop.complete(decoder, requests)
                finally:
                    self.peak_kv_bytes = decoder.peak_bytes
        self.num_restarts = loop.num_restarts
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
        if self.has_state or (self.kv_cache_gib is None and self.policy.device.type == "cpu"):
            return Room(None, max_new_tokens)
        num_tokens = tokens_in(self.kv_cache_gib, self.policy, self._bytes_per_token)
        return Room(num_tokens, max_new_tokens, bytes_per_token=self._bytes_per_token)

    @cached_property
    def _bytes_per_token(self) -> int:
        with torch.no_grad(), self.policy.evaluating(), self.policy.autocast():
            return bytes_per_token(self.policy)

    def _check_positions(self, prompts: Prompts, max_new_tokens: int) -> None:
        config = self.policy.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        needed = max(map(len, prompts.token_ids)) + max_new_tokens
        if positions and needed > positions:
            raise InputError(
                f"a prompt of {needed - max_new_tokens} tokens and max_completion_length are "
                f"{needed} tokens, but the model has {positions} positions; lower either"
            )


class _Loop:
    """Decodes step by step; requests start in their order, as soon as there is room."""

    def __init__(
        self, prompts: Prompts, drawing: Drawing, room: Room, max_tokens: int | None,
        on_completion: OnCompletion | None,
    ) -> None:  # fmt: skip
        self.prompts = prompts
        self.drawing = drawing
        self.room = room
        self.max_tokens = max_tokens
        self.on_completion = on_completion
        self.num_restarts = 0

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
                while len(rows) > 1 and self.room.is_short(decoder):
                    rows, tokens, stopped = self._stop_youngest(decoder, rows, tokens)
                    waiting = sorted([*stopped, *waiting], key=lambda request: -request.length)
                decoder.grow()
                tokens = drawing.from_hidden(decoder.step(tokens), rows)
                num_drawn += len(rows)
            rows, tokens = self._ended(decoder, rows, tokens)

    def _stop_youngest(
        self, decoder: Decoder, rows: Rows, tokens: Tensor
    ) -> tuple[Rows, Tensor, list[Request]]:
        """Half of the rows, with their last tokens, and requests to go on with the others later."""
        num_kept = len(rows) // 2
        kept = torch.arange(len(rows), device=tokens.device) < num_kept
        decoder.keep(kept, give_back=True)
        self.num_restarts += len(rows) - num_kept
        stopped = _requests(self.prompts, self.drawing.table, rows[num_kept:])
        return rows[:num_kept], tokens[:num_kept], stopped

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


def _tokens_at_most(prompts: Prompts, sampling: Sampling) -> int:
    """Of all prompts, with completions as long as they may become."""
    of_completions = sampling.num_generations * sampling.max_completion_length
    return sum(map(len, prompts.token_ids)) + len(prompts) * of_completions


def _requests(prompts: Prompts, table: Table, rows: Rows) -> list[Request]:
    """To go on with these rows; those behind equal tokens are one request."""
    num_generations = len(table.lengths) // len(prompts)
    prefixes = []
    for row in rows.tolist():
        prompt = prompts.token_ids[row // num_generations]
        drawn = table.completion(row)
        prefixes.append(torch.cat([prompt.cpu(), drawn]) if len(drawn) else prompt)
    return grouped(prefixes, [(row,) for row in rows.tolist()])
