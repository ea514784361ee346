"""Sequences that were prefilled together: one copy of each prompt's keys and values for its group.

The rows of a cohort have all drawn the same number of tokens, so their own keys and values fill the
same columns of a block and need no mask.

Legend: P prompts, R rows, Hkv key-value heads, K head size, L longest prompt, C columns of suffix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrl.integrations.decoding import Layer
from fastrl_kernels import decode_attention

FIRST_COLUMNS = 64
"""Tokens of a completion that there is memory for at first; more is taken by doubling."""
LIVE_SHARE = 0.75
"""Share of a cohort's slots in use below which the others' memory is given back. Attention still
goes through slots that have ended; all other layers leave them out at once."""


@dataclass
class KeyValues:
    """Of one layer."""

    prefix_k: Tensor  # (P, Hkv, L, K)
    prefix_v: Tensor
    suffix_k: Tensor  # (R, Hkv, C, K)
    suffix_v: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of the four."""
        return sum(x.nbytes for x in (self.prefix_k, self.prefix_v, self.suffix_k, self.suffix_v))


class Cohort:
    """Keys and values of P prompts and of the completions that continue them, layer by layer."""

    def __init__(
        self, prefix_lengths: Sequence[int], num_rows: Sequence[int], *, max_new_tokens: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        """num_rows: sequences of each prompt; max_new_tokens: at most drawn by one of them."""
        self.longest = max(prefix_lengths)
        self.max_new_tokens = max_new_tokens
        self.capacity = min(FIRST_COLUMNS, max_new_tokens)
        """Columns of the suffix that there is memory for."""
        self.prefix_lengths = torch.tensor(prefix_lengths, dtype=torch.int32, device=device)
        groups = torch.arange(len(prefix_lengths), dtype=torch.int32)
        self.row_groups = groups.repeat_interleave(torch.tensor(num_rows)).to(device)  # (R,)
        self.active = torch.arange(len(self.row_groups), device=device)  # slots that go on
        self.num_new = 0  # columns of the suffix in use
        self.counter: Tensor | None = None
        """(), int32: num_new where a recorded graph of operations can read it."""
        self.layers: dict[nn.Module, KeyValues] = {}

    @property
    def num_slots(self) -> int:
        """Rows that there is memory for."""
        return len(self.row_groups)

    @property
    def num_tokens(self) -> int:
        """Tokens that there is memory for, drawn or not."""
        return self.num_tokens_at(0)

    def num_tokens_at(self, num_columns: int) -> int:
        """The same when the suffix has grown to so many columns."""
        columns = max(self.capacity, min(num_columns, self.max_new_tokens))
        return len(self.prefix_lengths) * self.longest + self.num_slots * columns

    @property
    def is_full(self) -> bool:
        """Whether the next token needs more memory."""
        return self.num_new == self.capacity

    @property
    def next_capacity(self) -> int:
        """Columns of the suffix in the next step."""
        if not self.is_full:
            return self.capacity
        return min(max(2 * self.capacity, FIRST_COLUMNS), self.max_new_tokens)

    @property
    def growth(self) -> int:
        """Tokens of memory that the next step takes, below 0 where slots are given back."""
        if not self.is_full:
            return 0
        return len(self.active) * self.next_capacity - self.num_slots * self.capacity

    @property
    def num_bytes(self) -> int:
        """Memory of all layers."""
        return sum(layer.num_bytes for layer in self.layers.values())

    @property
    def positions(self) -> Tensor:
        """(R,) int64: where the next token of each row that goes on stands in its sequence."""
        return self.prefix_lengths[self.row_groups[self.active]].long() + self.num_new

    def keep_prefix(
        self, module: nn.Module, k: Tensor, v: Tensor, tokens_of: Mapping[int, slice]
    ) -> None:
        """Copy prompts out of a packed row, k and v (Hkv, N, K); tokens_of: where each is there."""
        if module not in self.layers:
            self.layers[module] = self._empty(k, v)
        layer = self.layers[module]
        for prompt, tokens in tokens_of.items():
            length = tokens.stop - tokens.start
            layer.prefix_k[prompt, :, :length] = k[:, tokens]
            layer.prefix_v[prompt, :, :length] = v[:, tokens]

    def _empty(self, k: Tensor, v: Tensor) -> KeyValues:
        num_prompts = len(self.prefix_lengths)

        def room(like: Tensor, num: int, length: int) -> Tensor:
            return like.new_empty(num, like.shape[0], length, like.shape[2])

        return KeyValues(
            room(k, num_prompts, self.longest),
            room(v, num_prompts, self.longest),
            room(k, self.num_slots, self.capacity),
            room(v, self.num_slots, self.capacity),
        )

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v (R, Hkv, K) of the rows that go on, and attend with q (R, H, K).

        With a `counter` the rows are those of all slots.
        """
        kept = self.layers[layer.module]
        if self.counter is not None:
            column = self.counter.long()[None]
            kept.suffix_k.index_copy_(2, column, k[:, :, None])
            kept.suffix_v.index_copy_(2, column, v[:, :, None])
            return self._attend(layer, q, self.counter + 1)
        new_k, new_v = kept.suffix_k[:, :, self.num_new], kept.suffix_v[:, :, self.num_new]
        all_go_on = len(self.active) == self.num_slots
        if all_go_on:
            new_k.copy_(k)
            new_v.copy_(v)
        else:
            new_k.index_copy_(0, self.active, k)
            new_v.index_copy_(0, self.active, v)
            q = q.new_zeros(self.num_slots, *q.shape[1:]).index_copy_(0, self.active, q)
        out = self._attend(layer, q, self.num_new + 1)
        return out if all_go_on else out[self.active]

    def _attend(self, layer: Layer, q: Tensor, suffix_length: int | Tensor) -> Tensor:
        kept = self.layers[layer.module]
        return decode_attention(
            q,
            kept.prefix_k,
            kept.prefix_v,
            kept.suffix_k,
            kept.suffix_v,
            row_groups=self.row_groups,
            prefix_lengths=self.prefix_lengths,
            suffix_length=suffix_length,
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
            sinks=layer.sinks,
        )

    def advance(self) -> None:
        """One more column of the suffix is in use."""
        self.num_new += 1
        if self.counter is not None:
            self.counter += 1

    def keep(self, goes_on: Tensor, *, live_share: float = LIVE_SHARE) -> None:
        """Drop rows; goes_on: bool, one a row that went on so far.

        Below `live_share` of the slots in use the memory of the others is given back.
        """
        self.active = self.active[goes_on]
        if 0 < len(self.active) < live_share * self.num_slots:
            self._rebuild()

    def grow(self) -> None:
        """Take memory for the next token, if it needs any."""
        if self.is_full:
            self.capacity = self.next_capacity
            self._rebuild()

    def _rebuild(self) -> None:
        """New memory: without slots that have ended and prompts without rows."""
        prompts, groups = self.row_groups[self.active].unique(return_inverse=True)
        prompts = prompts.long()
        for layer in self.layers.values():
            if len(prompts) < len(self.prefix_lengths):
                layer.prefix_k = layer.prefix_k[prompts]
                layer.prefix_v = layer.prefix_v[prompts]
            layer.suffix_k = self._rebuilt(layer.suffix_k)
            layer.suffix_v = self._rebuilt(layer.suffix_v)
        self.prefix_lengths = self.prefix_lengths[prompts]
        self.row_groups = groups.to(torch.int32)
        self.active = torch.arange(len(groups), device=groups.device)

    def _rebuilt(self, suffix: Tensor) -> Tensor:
        shape = (len(self.active), suffix.shape[1], self.capacity, suffix.shape[3])
        kept = suffix.new_empty(shape)
        kept[:, :, : self.num_new] = suffix[self.active, :, : self.num_new]
        return kept
