"""Token vectors on their way into a plan: checks, ragged ranges, and which tokens are trained.

Legend: B sequences of T tokens in all, M segments, S trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class TrainedTokens(NamedTuple):
    """The trained tokens of B sequences, in the caller's order."""

    flat_index: Tensor  # (S,) int64: the token among the T tokens of all sequences
    owners: Tensor  # (S,) int64: the sequence it belongs to
    offsets: Tensor  # (S,) int64: its place in that sequence
    counts: Tensor  # (B,) int64: trained tokens of each sequence
    needed: Tensor  # (B,) int64: tokens before the last trained one, which are those to encode
    num_before: Tensor  # (T + 1,) int64: trained tokens among the first 0, 1 ... T of all


def trained_tokens(trained: Tensor, lengths: Tensor) -> TrainedTokens:
    """Where a mask (T,) of B sequences of the given lengths is True.

    The last trained token of a sequence is predicted, not read, and nothing after it is needed.
    """
    num_before = pad(trained.cumsum(0), (1, 0))
    num_trained = int(num_before[-1])
    check_not_empty(num_trained)
    ends = lengths.cumsum(0)
    counts = num_before[ends] - num_before[ends - lengths]
    owners = torch.repeat_interleave(counts, output_size=num_trained)
    flat_index = trained.nonzero()[:, 0]
    offsets = flat_index - (ends - lengths).index_select(0, owners)
    needed = torch.zeros_like(lengths)
    has_any = counts > 0
    needed[has_any] = offsets[counts.cumsum(0)[has_any] - 1]
    return TrainedTokens(flat_index, owners, offsets, counts, needed, num_before)


def flat_mask(
    trained: Sequence[Tensor] | None, vectors: Sequence[Tensor], lengths: Tensor, begins: Tensor,
    *, name: str,
) -> Tensor:  # fmt: skip
    """(T,) the masks of B vectors in one; without masks, every token that something predicts.

    begins: (B,) bool: nothing precedes the vector, so its first token must not be trained; name:
    what messages call a vector.
    """
    begins = begins & (lengths > 0)
    first = (lengths.cumsum(0) - lengths)[begins]
    if trained is None:
        return torch.ones(int(lengths.sum()), dtype=torch.bool).index_fill_(0, first, 0)
    check_masks(trained, vectors)
    mask = torch.cat([torch.empty(0, dtype=torch.bool), *trained])
    if mask[first].any():
        raise ValueError(
            f"expected an untrained first token, which nothing predicts, got a trained one in "
            f"{name} {int(begins.nonzero()[mask[first]][0])}"
        )
    return mask


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The integers from starts[i] on, lengths[i] of them, for every i: one int64 vector."""
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shifts = (starts - (ends - lengths)).repeat_interleave(lengths, output_size=total)
    return shifts.add_(torch.arange(total))


def needed_segments(has_trained: Tensor, jumps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(M,) bool each: whether a segment or one below it has trained tokens; whether one below has.

    jumps: as `climb` gives them; what is known of a segment goes up 1, 2, 4 ... steps.
    """
    is_needed = pad(has_trained, (0, 1))
    for jump in jumps:
        is_needed[jump[is_needed]] = True
    has_children = torch.zeros_like(is_needed)
    has_children[jumps[0][:-1][is_needed[:-1]]] = True
    return is_needed[:-1], has_children[:-1]


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
