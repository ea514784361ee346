"""Tokens that end the thinking of a completion and that nobody draws.

Legend: B completions, R rows that go on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrl.encoding import Tokenizer
from fastrl.errors import InputError
from fastrl.rollout.randomness import Keys, uniforms
from fastrl.rollout.table import Rows, Table
from fastrl.thinking import ThinkingLimit

Forced = NDArray[np.int64] | None
"""(R,) the token that comes next whatever the logits are, or -1; None if all are drawn."""
BEFORE_THE_FIRST = -1
"""The position whose random number is the limit of a completion; its tokens begin at 0."""


class ForcedEnd:
    """Says which rows of the table get a token of the phrase instead of one that is drawn.

    A completion's limit is a function of its key, and is written down in the table: a call that
    goes on with it later has other keys.
    """

    def __init__(
        self, tokenizer: Any, eos_token_ids: list[int], limit: ThinkingLimit, keys: Keys,
        table: Table,
    ) -> None:  # fmt: skip
        """keys: (B,) of `completion_keys`."""
        self.tokenizer = tokenizer
        self.phrase = np.array(phrase_ids(tokenizer, eos_token_ids, limit), dtype=np.int64)
        self.end_of_thinking = limit.end_of_thinking
        self.table = table
        table.limit_thinking(drawn_budgets(keys, limit))

    def next_tokens(self, rows: Rows) -> Forced:
        """Of rows that go on."""
        table = self.table
        assert table.thinking_budgets is not None
        budgets, lengths = table.thinking_budgets[rows], table.lengths[rows]
        places = lengths - budgets
        is_forced = (places > 0) & (places < len(self.phrase))
        is_forced[is_forced] = ~table.sampled[rows[is_forced], budgets[is_forced]]
        for index in np.flatnonzero(places == 0).tolist():
            is_forced[index] = self._still_thinks(rows[index])
        if not is_forced.any():
            return None
        return np.where(is_forced, self.phrase[np.where(is_forced, places, 0)], -1)

    def _still_thinks(self, row: int) -> bool:
        return self.end_of_thinking not in _text(self.tokenizer, self.table.completion(row))


def drawn_budgets(keys: Keys, limit: ThinkingLimit) -> NDArray[np.int64]:
    """(B,) tokens after which each completion must have ended its thinking, all equally likely."""
    positions = np.full(len(keys), BEFORE_THE_FIRST, dtype=np.int64)
    num_limits = limit.max_thinking_tokens - limit.min_thinking_tokens + 1
    offsets = (uniforms(keys, positions).numpy() * num_limits).astype(np.int64)
    return limit.min_thinking_tokens + offsets


def phrase_ids(tokenizer: Tokenizer, eos_token_ids: list[int], limit: ThinkingLimit) -> list[int]:
    """The tokens of the phrase, which must read as the phrase does."""
    ids: list[int] = tokenizer(limit.phrase, add_special_tokens=False)["input_ids"]
    if limit.end_of_thinking not in _text(tokenizer, torch.tensor(ids)):
        raise InputError(
            f"the tokenizer cannot write {limit.end_of_thinking!r}, which ends thinking; set "
            "objective.parameters.end_of_thinking and objective.parameters.phrase, or "
            "objective.parameters.max_thinking_tokens = 0 for no limit"
        )
    if set(ids) & set(eos_token_ids):
        raise InputError(
            f"the phrase {limit.phrase!r} has a token that ends completions; no answer could "
            "follow it; set objective.parameters.phrase"
        )
    return ids


def check_thinking(
    tokenizer: Tokenizer, eos_token_ids: list[int], limit: ThinkingLimit,
    max_completion_length: int,
) -> None:  # fmt: skip
    """Raise InputError where no answer would fit behind the phrase."""
    num_tokens = len(phrase_ids(tokenizer, eos_token_ids, limit))
    needed = limit.max_thinking_tokens + num_tokens + 1
    if needed > max_completion_length:
        raise InputError(
            f"thinking of up to max_thinking_tokens = {limit.max_thinking_tokens} tokens, the "
            f"{num_tokens} tokens of the phrase that ends it and an answer need "
            f"rollout.max_completion_length of at least {needed}, got {max_completion_length}; "
            "raise it, lower objective.parameters.min_thinking_tokens and max_thinking_tokens, or "
            "set max_thinking_tokens = 0 for no limit"
        )


def refuse_thinking_limit(limit: ThinkingLimit | None, engine: str) -> None:
    """Raise InputError for an engine that draws every token itself."""
    if limit is not None:
        raise InputError(
            f"rollout.engine {engine!r} cannot put the phrase that ends thinking into a "
            "completion; use rollout.engine 'native' or 'generate', or set "
            "objective.parameters.max_thinking_tokens = 0 for no limit"
        )


def _text(tokenizer: Any, ids: Tensor) -> str:
    text: str = tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text
