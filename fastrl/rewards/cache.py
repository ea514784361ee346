"""Scores that need not be computed again."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

NUM_SCORES = 1 << 16
"""Scores kept, about 10 MB; the one not asked for longest goes first."""


class ScoreCache:
    """The scores last used, by everything that a deterministic reward can depend on."""

    def __init__(self, num_scores: int = NUM_SCORES) -> None:
        self._scores: OrderedDict[bytes, float | None] = OrderedDict()
        self._num_scores = num_scores

    def __contains__(self, key: bytes) -> bool:
        return key in self._scores

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, key: bytes) -> float | None:
        """The score of a key it contains; None where the reward did not apply."""
        self._scores.move_to_end(key)
        return self._scores[key]

    def put(self, key: bytes, score: float | None) -> None:
        """Keep a score, for as long as it is used more than others."""
        self._scores[key] = score
        self._scores.move_to_end(key)
        if len(self._scores) > self._num_scores:
            self._scores.popitem(last=False)

    def drop(self, key: bytes) -> None:
        """Keep a score no longer, if it is there."""
        self._scores.pop(key, None)


def score_key(reward: int, example: bytes, text: str, completion_ids: Sequence[int]) -> bytes:
    """A hash of reward, example and completion.

    reward: its position; example: a hash of fixed length.
    """
    head = struct.pack(f"=2q{len(completion_ids)}q", reward, len(completion_ids), *completion_ids)
    return hash_of(head + example + text.encode("utf-8", "surrogatepass"))


def hash_of(data: bytes) -> bytes:
    """20 bytes that no other data has."""
    return blake2b(data, digest_size=20).digest()
