"""Scores for the tests of select_tokens, and its result by sorting lists of Python numbers."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

KINDS = ("normal", "ties", "equal", "zeros", "infinities", "huge", "close")
AMOUNTS: tuple[dict[str, Any], ...] = (
    {"ratio": 0.2}, {"ratio": 0.7}, {"ratio": 1.0}, {"ratio": 1e-6},
    {"budget": 1}, {"budget": 10}, {"budget": 10**6},
)  # fmt: skip


def make_scores(kind: str, num_tokens: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(S,) scores of one kind of difficulty."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    few = torch.randint(-2, 3, (num_tokens,), generator=generator).double()
    values = {
        "normal": normal,
        "ties": few,
        "equal": torch.full_like(normal, -0.3),
        "zeros": torch.where(few > 0, 0.0, -0.0),
        "infinities": torch.where(few.abs() == 2, few * math.inf, normal),
        "huge": normal.sign() * torch.exp2(40 * normal.abs()).clamp(max=1e38),
        "close": 1 + (few + normal.round()) * torch.finfo(dtype).eps,  # in the last bits alone
    }[kind]
    return values.to(dtype)


def make_mask(num_tokens: int, seed: int = 1) -> Tensor:
    """Two tokens of three, on average."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, generator=generator) < 2 / 3


def make_lengths(num_tokens: int, num_sequences: int) -> Tensor:
    """(B,) that sum up to the tokens; short, long and empty sequences."""
    generator = torch.Generator().manual_seed(2)
    cuts = torch.randint(0, num_tokens + 1, (num_sequences - 1,), generator=generator)
    cuts = cuts.sort().values
    return torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), num_tokens)]).diff()


def brute_force(
    scores: Tensor, mask: Tensor | None = None, *, ratio: float | None = None,
    budget: int | None = None, per: str = "batch", lengths: Tensor | None = None,
) -> list[bool]:  # fmt: skip
    """`select_tokens` of (S,) scores without NaN: largest first, of equal ones the earlier."""
    values = scores.tolist()
    allowed = [True] * len(values) if mask is None else mask.tolist()
    sizes = [len(values)] if per == "batch" or lengths is None else lengths.tolist()
    ends = list(itertools.accumulate(sizes))
    kept = [False] * len(values)
    for size, end in zip(sizes, ends, strict=True):
        candidates = [token for token in range(end - size, end) if allowed[token]]
        number = budget
        if ratio is not None:
            number = max(1, math.floor(ratio * len(candidates) + 1e-9))
        for token in sorted(candidates, key=lambda token: (-values[token], token))[:number]:
            kept[token] = True
    return kept
