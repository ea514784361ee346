"""Strings that end a completion, found in tokens without decoding them.

Legend: R rows, C completion length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StopStringCriteria

from fastrl.errors import InputError


class StopStrings:
    """Whether a completion's last token completes a string; earlier text of the prompt is no part.

    Matching is transformers' `StopStringCriteria`: a token may begin before the string and end
    after it.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        for string in strings:
            if not string:
                raise InputError("rollout.stop_strings has an empty string; remove it")
            if not _can_match(tokenizer, string):
                raise InputError(
                    f"the stop string {string!r} would never match the tokens of this tokenizer; "
                    "remove it from rollout.stop_strings or choose characters that it has"
                )
        self._criteria = StopStringCriteria(tokenizer, list(strings))
        self.window: int = self._criteria.maximum_token_len  # tokens that a string may take
        self._filler: int = self._criteria.embedding_vec.shape[0]  # a token that is in no string

    def ended(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(R,) bool: whether the first `lengths` (R,) tokens of each row of ids (R, C) end so."""
        columns = lengths[:, None] - self.window + torch.arange(self.window, device=ids.device)
        tail = ids.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, self._filler)
        found: Tensor = self._criteria(tail, None)
        return found


@functools.lru_cache(maxsize=4)
def stop_strings_of(tokenizer: Any, strings: tuple[str, ...]) -> StopStrings | None:
    """None for no strings; made once, as a large vocabulary takes longer to read than a step."""
    return StopStrings(tokenizer, strings) if strings else None


def _can_match(tokenizer: Any, string: str) -> bool:
    """Whether the string's own tokens are found."""
    try:
        criteria = StopStringCriteria(tokenizer, [string])
    except ValueError:  # no token holds even the string's end
        return False
    ids = tokenizer(string, add_special_tokens=False, return_tensors="pt").input_ids
    return bool(ids.shape[1]) and bool(criteria(ids, None)[0])
