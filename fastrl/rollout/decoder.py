"""The training model as a decoder: prompts in packed rows, then one token of each sequence.

Legend: P prompts, R rows that go on, N packed tokens, D hidden, C most new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from fastrl.integrations.decoding import Layer, decode_inputs
from fastrl.integrations.transformers import segment_attention_enabled
from fastrl.packing import Plan
from fastrl.policy import Policy
from fastrl.rollout.cohort import LIVE_SHARE, Cohort
from fastrl.rollout.requests import Request, alike
from fastrl_kernels import make_segments

PREFILL_TOKENS = 8192
"""Most tokens of prompts in one forward pass, but for one that is longer."""


MAX_WASTE = 0.25
MIN_WASTE = 64
"""Prompts are padded to the longest of their cohort: by this fraction of it or so many tokens."""


class Decoder(Protocol):
    """Runs the model on sequences that grow; its rows are in the order in which they came."""

    peak_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens that there is memory for, drawn or not."""
        ...

    @property
    def growth(self) -> int:
        """Tokens of memory that the next step takes beyond that."""
        ...

    @property
    def longest_next(self) -> int:
        """New tokens of a row that there is memory for after the next step, where most."""
        ...

    def num_tokens_at(self, num_columns: int) -> int:
        """num_tokens when every row has grown to so many new tokens."""
        ...

    def admissible(self, requests: Sequence[Request]) -> int:
        """How many of the first requests may start now, memory aside."""
        ...

    def admit(self, requests: Sequence[Request]) -> Tensor:
        """Encode the prefixes; (R, D) hidden states that predict the first tokens of new rows."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append the tokens (R,) that were drawn last; (R, D) states that predict the next."""
        ...

    def grow(self) -> None:
        """Take the memory that the next step needs."""
        ...

    def keep(self, goes_on: Tensor, *, give_back: bool = False) -> None:
        """Drop rows: goes_on (R,) bool; give_back: their memory too, at once."""
        ...


class PackedDecoder:
    """Cohorts of sequences; rows are those of the cohorts side by side, oldest first."""

    def __init__(self, policy: Policy, max_new_tokens: int) -> None:
        self.policy = policy
        self.max_new_tokens = max_new_tokens
        self.cohorts: list[Cohort] = []
        self.peak_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(cohort.num_bytes for cohort in self.cohorts)

    @property
    def num_tokens(self) -> int:
        """Tokens that there is memory for, drawn or not."""
        return sum(cohort.num_tokens for cohort in self.cohorts)

    @property
    def growth(self) -> int:
        """See `Decoder`."""
        return sum(cohort.growth for cohort in self.cohorts)

    @property
    def longest_next(self) -> int:
        """See `Decoder`."""
        return max(cohort.next_capacity for cohort in self.cohorts)

    def num_tokens_at(self, num_columns: int) -> int:
        """See `Decoder`."""
        return sum(cohort.num_tokens_at(num_columns) for cohort in self.cohorts)

    def grow(self) -> None:
        """See `Decoder`."""
        for cohort in self.cohorts:
            cohort.grow()
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def admissible(self, requests: Sequence[Request]) -> int:
        """How many of the first requests may start now as one cohort, memory aside."""
        return alike(requests, max_waste=MAX_WASTE, min_waste=MIN_WASTE)

    def admit(self, requests: Sequence[Request]) -> Tensor:
        """Encode the prefixes; (R, D) hidden states that predict the first tokens of new rows."""
        cohort = Cohort(
            [request.length for request in requests],
            [len(request.rows) for request in requests],
            max_new_tokens=self.max_new_tokens,
            device=self.policy.device,
        )
        hidden = [
            self._prefill(cohort, first, requests[first:stop])
            for first, stop in pairwise(_passes([request.length for request in requests]))
        ]
        self.cohorts.append(cohort)
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        return torch.cat(hidden)[cohort.row_groups]

    def _prefill(self, cohort: Cohort, first: int, requests: Sequence[Request]) -> Tensor:
        """(P, D) final hidden states of the last tokens; keys and values go to the cohort."""
        plan = _plan(requests).to(self.policy.device)
        starts = plan.segments.host.starts.tolist()
        tokens_of = {
            first + p: slice(start, start + request.length)
            for p, (start, request) in enumerate(zip(starts, requests, strict=True))
        }

        def keep(module: nn.Module, k: Tensor, v: Tensor) -> None:
            k, v = k[0].to(v.dtype), v[0]  # autocast leaves rotated keys in float32
            cohort.keep_prefix(module, k, v, tokens_of)

        model = self.policy.model
        with segment_attention_enabled(
            model, plan.source_index, num_tokens=len(plan.input_ids), keep=keep
        ):
            hidden = self.policy.body(**plan.inputs).last_hidden_state[0]
        return hidden[plan.source_index]

    def step(self, tokens: Tensor) -> Tensor:
        """Append the tokens (R,) that were drawn last; (R, D) hidden states that predict the next.

        Runs within `decoding(model, decoder)`.
        """
        positions = torch.cat([cohort.positions for cohort in self.cohorts])
        hidden: Tensor = self.policy.body(**decode_inputs(tokens, positions)).last_hidden_state[0]
        for cohort in self.cohorts:
            cohort.advance()
        return hidden

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every cohort's attention; see `KeyValueStore`."""
        parts = [
            cohort.attend(layer, q[rows], k[rows], v[rows])
            for cohort, rows in zip(self.cohorts, self._rows(), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def keep(self, goes_on: Tensor, *, give_back: bool = False) -> None:
        """See `Decoder`."""
        for cohort, rows in zip(self.cohorts, list(self._rows()), strict=True):
            cohort.keep(goes_on[rows], live_share=1.0 if give_back else LIVE_SHARE)
        self.cohorts = [cohort for cohort in self.cohorts if len(cohort.active)]

    def _rows(self) -> Iterator[slice]:
        """Where the rows of each cohort are."""
        start = 0
        for cohort in self.cohorts:
            yield slice(start, start := start + len(cohort.active))


def bytes_per_token(policy: Policy) -> int:
    """Memory of one token's keys and values in all layers, found out with a prompt of one token."""
    decoder = PackedDecoder(policy, 0)
    decoder.admit([Request(torch.tensor(policy.eos_token_ids[:1]), (0,))])
    return decoder.num_bytes


def _plan(requests: Sequence[Request]) -> Plan:
    """Prefixes side by side, nothing shared; the last token of each predicts."""
    lengths = [request.length for request in requests]
    segments = make_segments(lengths, [-1] * len(lengths))
    index = torch.arange(len(lengths))
    return Plan(
        input_ids=torch.cat([request.prefix_ids.cpu() for request in requests]),
        segments=segments,
        source_index=segments.starts + segments.lengths - 1,
        target_ids=index,
        completion_index=index,
        completion_lengths=(1,) * len(lengths),
        num_unshared_tokens=sum(lengths),
    )


def _passes(lengths: Sequence[int]) -> list[int]:
    """Where passes of at most PREFILL_TOKENS begin, and the end."""
    bounds, total = [0], 0
    for index, length in enumerate(lengths):
        total += length
        if total > PREFILL_TOKENS and index > bounds[-1]:
            bounds.append(index)
            total = length
    return [*bounds, len(lengths)]
