"""Token vectors on their way into a plan: checks, ragged ranges, and which tokens are trained.

Legend: B sequences of T tokens in all, S trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TrainedTokens(NamedTuple):
    """The trained tokens of B sequences, in the caller's order."""

    flat_index: Tensor  # (S,) int64: the token among the T tokens of all sequences
    owners: Tensor  # (S,) int64: the sequence it belongs to
    offsets: Tensor  # (S,) int64: its place in that sequence
    counts: Tensor  # (B,) int64: trained tokens of each sequence
    needed: Tensor  # (B,) int64: tokens before the last trained one, which are those to encode


def trained_tokens(trained: Sequence[Tensor], lengths: Tensor) -> TrainedTokens:
    """Where the True elements of B masks lie; lengths: (B,) of the masks.

    The last trained token of a sequence is predicted, not read, and nothing after it is needed.
    """
    flat_index = torch.cat([torch.empty(0, dtype=torch.bool), *trained]).nonzero()[:, 0]
    check_not_empty(len(flat_index))
    ends = lengths.cumsum(0)
    owners = torch.searchsorted(ends, flat_index, right=True)
    offsets = flat_index - (ends - lengths)[owners]
    counts = torch.bincount(owners, minlength=len(lengths))
    needed = torch.zeros_like(lengths)
    last = counts.cumsum(0)[counts > 0] - 1
    needed[counts > 0] = offsets[last]
    return TrainedTokens(flat_index, owners, offsets, counts, needed)


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The integers from starts[i] on, lengths[i] of them, for every i: one int64 vector."""
    shifts = starts - (lengths.cumsum(0) - lengths)
    total = int(lengths.sum())
    return torch.arange(total) + shifts.repeat_interleave(lengths, output_size=total)


def lengths_of(vectors: Sequence[Tensor]) -> Tensor:
    """(B,) int64 lengths of B vectors."""
    return torch.tensor([vector.numel() for vector in vectors], dtype=torch.int64)


def check_token_ids(vectors: Sequence[Tensor]) -> None:
    """Refuse anything but int64 vectors on the CPU, where plans are built."""
    for ids in vectors:
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise ValueError(f"expected int64 token vectors, got {tuple(ids.shape)} of {ids.dtype}")
        if not ids.is_cpu:
            raise ValueError(
                f"expected token vectors on the CPU, got {ids.device}; "
                "the plan's `to` moves what the model needs"
            )


def check_masks(masks: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
    """Refuse anything but one bool per token."""
    if len(masks) != len(vectors):
        raise ValueError(
            f"expected one mask of trained tokens per token vector, got {len(masks)} masks for "
            f"{len(vectors)} vectors"
        )
    for index, (mask, ids) in enumerate(zip(masks, vectors, strict=True)):
        if mask.shape != ids.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"expected {tuple(ids.shape)} bool as mask {index}, one value per token, "
                f"got {tuple(mask.shape)} of {mask.dtype}"
            )


def check_not_empty(num_trained: int) -> None:
    """Refuse a plan without a trained token: it would have no packed token either."""
    if num_trained == 0:
        raise ValueError("expected at least one trained token to pack, got none; skip the pass")
