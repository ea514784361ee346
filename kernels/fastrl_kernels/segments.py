"""A packed row as a forest of segments: one int32 a token says who sees whom.

N packed tokens, M segments. The segments lie in depth-first preorder: a parent, then each child
with all that is below it. Plain packing is a forest of roots; a prompt with G completions is a root
with G children; a search tree is deeper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """A forest of segments over one packed row; `make_segments` builds it."""

    lengths: Tensor
    """(M,) int64: tokens of each segment, zero allowed."""
    parents: Tensor
    """(M,) int64: index of the segment that this one continues, -1 for a root."""
    starts: Tensor
    """(M,) int64: first token of each segment."""
    subtree_ends: Tensor
    """(M,) int64: one past the last token of the segment and of everything below it."""
    ends: Tensor
    """(N,) int32: `subtree_ends` of the token's segment; q sees k iff k <= q and q < ends[k]."""
    positions: Tensor
    """(N,) int64: index of the token along the path from its root."""

    @property
    def num_tokens(self) -> int:
        return self.ends.shape[0]

    @property
    def num_segments(self) -> int:
        return self.lengths.shape[0]

    def to(self, device: torch.device | str) -> "Segments":
        """The same forest on another device."""
        return Segments(
            lengths=self.lengths.to(device),
            parents=self.parents.to(device),
            starts=self.starts.to(device),
            subtree_ends=self.subtree_ends.to(device),
            ends=self.ends.to(device),
            positions=self.positions.to(device),
        )

    def visibility(self, window: int | None = None) -> Tensor:
        """(N, N) bool: True where the token of the row sees the token of the column.

        window: only the last `window` tokens of the path, the token itself included; None for all
        of them. For references and tests: attention itself never holds as much.
        """
        if window is not None and window < 1:
            raise ValueError(
                f"window must be a positive number of tokens, got {window}; "
                "pass None to see the whole path"
            )
        token = torch.arange(self.num_tokens, device=self.ends.device)
        visible = (token[None, :] <= token[:, None]) & (token[:, None] < self.ends[None, :])
        if window is not None:
            visible &= self.positions[:, None] - self.positions[None, :] < window
        return visible


def make_segments(lengths: Sequence[int] | Tensor, parents: Sequence[int] | Tensor) -> Segments:
    """Forest of segments on the CPU, from M lengths and the M indices of their parents (-1 for a
    root).

    The segments must be in depth-first preorder: each one continues the segment before it or an
    ancestor of that one.
    """
    sizes, above = _as_list("lengths", lengths), _as_list("parents", parents)
    _check_forest(sizes, above)
    starts: list[int] = []
    depths: list[int] = []
    total = 0
    for size, parent in zip(sizes, above, strict=True):
        starts.append(total)
        depths.append(0 if parent < 0 else depths[parent] + sizes[parent])
        total += size
    subtree_ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    for segment in reversed(range(len(sizes))):
        if above[segment] >= 0:
            parent = above[segment]
            subtree_ends[parent] = max(subtree_ends[parent], subtree_ends[segment])
    if total > torch.iinfo(torch.int32).max:
        raise ValueError(f"a packed row holds at most 2**31 - 1 tokens, got {total}; split the row")
    as_tensor = [
        torch.tensor(x, dtype=torch.int64) for x in (sizes, above, starts, subtree_ends, depths)
    ]
    length, parent_ids, start, subtree_end, depth = as_tensor
    return Segments(
        lengths=length,
        parents=parent_ids,
        starts=start,
        subtree_ends=subtree_end,
        ends=subtree_end.repeat_interleave(length).to(torch.int32),
        positions=torch.arange(total) + (depth - start).repeat_interleave(length),
    )


def _as_list(name: str, values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(
                f"{name} must be one-dimensional integers, got {values.dtype} of shape "
                f"{tuple(values.shape)}; pass one integer per segment"
            )
        return values.tolist()
    return [int(value) for value in values]


def _check_forest(lengths: list[int], parents: list[int]) -> None:
    if len(lengths) != len(parents):
        raise ValueError(
            f"lengths and parents must have one value per segment, got {len(lengths)} and "
            f"{len(parents)}; give every root the parent -1"
        )
    path: list[int] = []
    for segment, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        if length < 0:
            raise ValueError(
                f"lengths must be zero or more, got {length} for segment {segment}; "
                "an empty segment has length 0"
            )
        if not -1 <= parent < segment:
            raise ValueError(
                f"the parent of segment {segment} must be -1 or a segment before it, got {parent}; "
                "put parents before their children"
            )
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            raise ValueError(
                f"segments must be in depth-first preorder, got segment {segment} below segment "
                f"{parent}, whose subtree has already ended; put each child straight after its "
                "parent or its sibling's subtree"
            )
        path.append(segment)
