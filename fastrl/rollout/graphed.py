"""Decoding steps of constant shape, recorded once as a CUDA graph and replayed.

A step of a small batch is hundreds of short kernels, and launching them takes a CPU longer than a
GPU needs to run them. Here all slots of a cohort take part in a step, ended or not, so that nothing
changes from step to step but numbers in memory; a graph lasts until slots are given back or prompts
join.

Legend: R rows that go on, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.integrations.decoding import Layer, decode_inputs
from fastrl.policy import Policy
from fastrl.rollout.decoder import PackedDecoder
from fastrl.rollout.requests import Request

NUM_WARM_UPS = 2
"""Steps of a shape that run as they are: they compile kernels and choose algorithms."""


class GraphedDecoder(PackedDecoder):
    """A packed decoder that replays its steps; without `capture` it runs them, slot for slot."""

    def __init__(self, policy: Policy, max_new_tokens: int, *, capture: bool) -> None:
        super().__init__(policy, max_new_tokens)
        self.capture = capture
        self._reshape()

    def _reshape(self) -> None:
        """Forget the graph: the slots have changed."""
        device = self.policy.device
        self.num_steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden = torch.zeros(0, device=device)
        self.num_slots = sum(cohort.num_slots for cohort in self.cohorts)
        self.tokens = torch.zeros(self.num_slots, dtype=torch.int64, device=device)

    def admit(self, requests: Sequence[Request]) -> Tensor:
        """See `PackedDecoder.admit`."""
        hidden = super().admit(requests)
        self.cohorts[-1].counter = torch.zeros((), dtype=torch.int32, device=hidden.device)
        self._reshape()
        return hidden

    def grow(self) -> None:
        """See `PackedDecoder.grow`."""
        if any(cohort.is_full for cohort in self.cohorts):
            super().grow()
            self._reshape()

    def keep(self, goes_on: Tensor, *, give_back: bool = False) -> None:
        """See `PackedDecoder.keep`."""
        super().keep(goes_on, give_back=give_back)
        if sum(cohort.num_slots for cohort in self.cohorts) != self.num_slots:
            self._reshape()

    def step(self, tokens: Tensor) -> Tensor:
        """See `PackedDecoder.step`; slots that have ended get tokens that nobody reads."""
        places = self._places()
        self.tokens.index_copy_(0, places, tokens)
        if self.graph is None and self.capture and self.num_steps >= NUM_WARM_UPS:
            self._record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.hidden = self._forward()
            self.num_steps += 1
        for cohort in self.cohorts:
            cohort.advance()
        return self.hidden[places]

    def _record(self) -> None:
        """Record a step; recording runs nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.hidden = self._forward()
        self.graph = graph

    def _forward(self) -> Tensor:
        """Final hidden states of all slots; reads nothing on the host that a step changes."""
        positions = []
        for cohort in self.cohorts:
            assert cohort.counter is not None
            positions.append(cohort.prefix_lengths[cohort.row_groups].long() + cohort.counter)
        inputs = decode_inputs(self.tokens, torch.cat(positions))
        hidden: Tensor = self.policy.body(**inputs).last_hidden_state[0]
        return hidden

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `PackedDecoder.attend`, with the rows of all slots."""
        parts, start = [], 0
        for cohort in self.cohorts:
            rows = slice(start, start := start + cohort.num_slots)
            parts.append(cohort.attend(layer, q[rows], k[rows], v[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _places(self) -> Tensor:
        """(R,) slots of the rows that go on."""
        starts, start = [], 0
        for cohort in self.cohorts:
            starts.append(cohort.active + start)
            start += cohort.num_slots
        return torch.cat(starts)
