"""Decoding with transformers' own cache, for models with convolutions or recurrent states.

Their states have no padding, so prompts of equal length decode together, one length after the
other.

Legend: P prompts, R rows that go on, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.policy import Policy
from fastrl.rollout.requests import Request, alike


class CachedDecoder:
    """One batch of sequences of equal length; a prompt's state is copied for each of its rows."""

    # No budget is kept: states have no size a token.
    num_tokens = growth = longest_next = peak_bytes = 0

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cache: Any = None

    def admissible(self, requests: Sequence[Request]) -> int:
        """How many of the first requests may start now, memory aside."""
        return 0 if self.cache is not None else alike(requests, max_waste=0.0, min_waste=0)

    def admit(self, requests: Sequence[Request]) -> Tensor:
        """Encode the prefixes; (R, D) hidden states that predict the first tokens of new rows."""
        ids = torch.stack([request.prefix_ids for request in requests]).to(self.policy.device)
        hidden = self._forward(ids)
        num_rows = torch.tensor([len(request.rows) for request in requests], device=ids.device)
        groups = torch.arange(len(requests), device=ids.device).repeat_interleave(num_rows)
        self.cache.reorder_cache(groups)
        return hidden[groups]

    def step(self, tokens: Tensor) -> Tensor:
        """Append the tokens (R,) that were drawn last; (R, D) states that predict the next."""
        return self._forward(tokens[:, None])

    def _forward(self, input_ids: Tensor) -> Tensor:
        out = self.policy.body(input_ids=input_ids, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        hidden: Tensor = out.last_hidden_state[:, -1]
        return hidden

    def num_tokens_at(self, num_columns: int) -> int:
        """See `Decoder`."""
        return 0

    def grow(self) -> None:
        """transformers' cache does."""

    def keep(self, goes_on: Tensor, *, give_back: bool = False) -> None:
        """Drop rows: goes_on (R,) bool."""
        if goes_on.any():
            self.cache.reorder_cache(goes_on.nonzero()[:, 0])
        else:
            self.cache = None
