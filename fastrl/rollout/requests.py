"""What is to be sampled: completions that continue the same tokens are one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """Completions, by their row b, that continue the same tokens."""

    prefix_ids: Tensor  # int64
    rows: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens before the first one to draw."""
        return len(self.prefix_ids)


def grouped(prefixes: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> list[Request]:
    """One request for all rows with the same prefix; the longest first: memory fails early."""
    found: dict[bytes, Request] = {}
    for ids, some in zip(prefixes, rows, strict=True):
        key = ids.cpu().numpy().tobytes()
        known = found[key].rows if key in found else ()
        found[key] = Request(ids, (*known, *some))
    return sorted(found.values(), key=lambda request: -request.length)


def alike(requests: Sequence[Request], *, max_waste: float, min_waste: int) -> int:
    """How many of the first requests are about as long as the first, at least that one.

    Padded to the first's length, one of them wastes at most the fraction max_waste of it, or
    min_waste tokens.
    """
    longest = requests[0].length
    allowed = max(int(max_waste * longest), min_waste)
    return next(
        (n for n, request in enumerate(requests) if longest - request.length > allowed),
        len(requests),
    )
