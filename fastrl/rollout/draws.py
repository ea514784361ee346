"""From logits to tokens in the table, for the completions of one call of an engine.

Legend: B completions, R rows that go on, C most tokens of one, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.policy import Policy
from fastrl.rollout import Sampling
from fastrl.rollout.drawing import Drawn, draw
from fastrl.rollout.randomness import Keys, uniforms
from fastrl.rollout.stopping import stop_strings_of
from fastrl.rollout.table import Rows, Table
from fastrl.rollout.thinking import Forced, ForcedEnd
from fastrl.types import Prompts
from fastrl_kernels.head_logits import head_logits

LOGITS_AT_A_TIME = 2**26
"""Values of logits in memory at once."""


class Drawing:
    """Draws the next token of rows of the table and writes down which of them have ended."""

    def __init__(
        self, policy: Policy, sampling: Sampling, keys: Keys, table: Table, prompts: Prompts
    ) -> None:
        """keys: (B,) of `completion_keys`; prompts: what a repetition penalty counts as said."""
        self.sampling = sampling
        self.keys = keys
        self.table = table
        self.head = policy.lm_head
        self.ends = torch.tensor(policy.eos_token_ids, device=policy.device)
        self.stop_strings = stop_strings_of(policy.tokenizer, sampling.stop_strings)
        self.forced_end: ForcedEnd | None = None
        if sampling.thinking is not None:
            self.forced_end = ForcedEnd(
                policy.tokenizer, policy.eos_token_ids, sampling.thinking, keys, table
            )
        self.seen: Tensor | None = None  # (B, V) bool
        if sampling.repetition_penalty != 1.0:
            self.seen = self._said(prompts)

    @property
    def temperature(self) -> float:
        """What logits are divided by."""
        return self.sampling.temperature or 1.0

    def from_hidden(self, hidden: Tensor, rows: Rows) -> Tensor:
        """See `from_logits`; hidden (R, D) final hidden states."""
        size = max(1, LOGITS_AT_A_TIME // self.head.num_columns)
        hidden = hidden.to(self.head.weight.dtype)
        forced = self._forced(rows)
        parts = []
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits = head_logits(hidden[part], self.head, temperature=self.temperature)
            some = None if forced is None else forced[part]
            parts.append(self._draw(logits, rows[part], some))
        return self._written(Drawn(*map(torch.cat, zip(*parts, strict=True))), rows, forced)

    def from_logits(self, logits: Tensor, rows: Rows) -> Tensor:
        """Draw a token of each row from its logits (R, V) over temperature: (R,) tokens."""
        forced = self._forced(rows)
        return self._written(self._draw(logits, rows, forced), rows, forced)

    def _forced(self, rows: Rows) -> Forced:
        return None if self.forced_end is None else self.forced_end.next_tokens(rows)

    def _draw(self, logits: Tensor, rows: Rows, forced: Forced) -> Drawn:
        numbers = uniforms(self.keys[rows], self.table.lengths[rows]).to(logits.device)
        seen = None if self.seen is None else self.seen[torch.from_numpy(rows)]
        tokens = None if forced is None else torch.from_numpy(forced).to(logits.device)
        return draw(logits, numbers, self.sampling, seen, tokens)

    def _written(self, drawn: Drawn, rows: Rows, forced: Forced) -> Tensor:
        table = self.table
        table.append(rows, drawn, forced)
        ended = torch.isin(drawn.tokens, self.ends)
        places = torch.from_numpy(rows).to(ended.device)
        if self.stop_strings is not None:
            lengths = torch.from_numpy(table.lengths[rows]).to(ended.device)
            ended |= self.stop_strings.ended(table.ids[places], lengths)
        if self.seen is not None:
            self.seen[places, drawn.tokens] = True
        table.finished[rows] = ended.cpu().numpy()
        if forced is not None:  # an answer is to follow, whatever the phrase has in it
            table.finished[rows] &= forced < 0
        return drawn.tokens

    def _said(self, prompts: Prompts) -> Tensor:
        shape = (len(self.keys), self.head.num_columns)
        seen = torch.zeros(shape, dtype=torch.bool, device=self.ends.device)
        for prompt, rows in enumerate(seen.chunk(len(prompts))):
            rows[:, prompts.token_ids[prompt].to(seen.device)] = True
        for row, length in enumerate(self.table.lengths):  # of an earlier call
            seen[row, self.table.ids[row, :length]] = True
        return seen
