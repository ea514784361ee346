"""A packed row as a forest of segments: one int32 a token says who sees whom.

N packed tokens, M segments. The segments lie in depth-first preorder: a parent, then each child
with all that is below it. Plain packing is a forest of roots; a prompt with G completions is a root
with G children; a search tree is deeper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


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
    depths: Tensor
    """(M,) int64: tokens on the path before each segment."""
    on_cpu: "Segments | None" = None
    """The forest on the CPU that this one was moved from."""

    @property
    def num_tokens(self) -> int:
        return self.ends.shape[0]

    @property
    def num_segments(self) -> int:
        return self.lengths.shape[0]

    @property
    def host(self) -> "Segments":
        """The same forest where its numbers can be read without waiting for a device."""
        return self.on_cpu or self

    def to(self, device: torch.device | str) -> "Segments":
        """The same forest on another device."""
        if self.ends.device == torch.device(device):
            return self
        return Segments(
            lengths=self.lengths.to(device),
            parents=self.parents.to(device),
            starts=self.starts.to(device),
            subtree_ends=self.subtree_ends.to(device),
            ends=self.ends.to(device),
            positions=self.positions.to(device),
            depths=self.depths.to(device),
            on_cpu=self.host,
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
    ancestor of that one. A few passes over all segments at once, whatever the depth.
    """
    sizes, parent_ids = _as_vector("lengths", lengths), _as_vector("parents", parents)
    _check_values(sizes, parent_ids)
    total = int(sizes.sum())
    if total > torch.iinfo(torch.int32).max:
        raise ValueError(f"a packed row holds at most 2**31 - 1 tokens, got {total}; split the row")
    jumps, levels = climb(parent_ids)
    _check_preorder(parent_ids, jumps, levels)
    starts, depths = sizes.cumsum(0) - sizes, path_lengths(sizes, jumps) - sizes
    subtree_ends = pad(starts, (0, 1), value=total)[_next_outside(jumps)]
    shifts = (depths - starts).repeat_interleave(sizes, output_size=total)
    return Segments(
        lengths=sizes,
        parents=parent_ids,
        starts=starts,
        subtree_ends=subtree_ends,
        ends=subtree_ends.to(torch.int32).repeat_interleave(sizes, output_size=total),
        positions=shifts.add_(torch.arange(total)),
        depths=depths,
    )


def climb(parents: Tensor) -> tuple[list[Tensor], Tensor]:
    """Tables of the ancestor 1, 2, 4, 8 ... steps up, until nobody has one; segments of each path.

    All are (M + 1,): one more node, M, stands above all roots and above itself, with no segment on
    its path. Each table is the one before it applied twice, so any depth takes log2 of it steps.
    """
    top = len(parents)
    jumps = [pad(parents.where(parents >= 0, top), (0, 1), value=top)]
    levels = pad(torch.ones_like(parents), (0, 1))
    while bool((jumps[-1] < top).any()):
        levels = levels + levels[jumps[-1]]
        jumps.append(jumps[-1][jumps[-1]])
    return jumps, levels


def climbed(nodes: Tensor, steps: Tensor, jumps: list[Tensor]) -> Tensor:
    """The ancestors so many steps above the nodes, 0 for themselves."""
    for power, jump in enumerate(jumps):
        nodes = torch.where((steps >> power) % 2 == 1, jump[nodes], nodes)
    return nodes


def path_lengths(sizes: Tensor, jumps: list[Tensor]) -> Tensor:
    """(M,) tokens from the root to the end of each segment."""
    totals = pad(sizes, (0, 1))
    for jump in jumps[:-1]:
        totals = totals + totals[jump]
    return totals[:-1]


def _next_outside(jumps: list[Tensor]) -> Tensor:
    """(M,) the first segment after the subtree of each one, M for none.

    It is the next sibling of the segment, or of the nearest ancestor that has one.
    """
    above = jumps[0]
    top = len(above) - 1
    order = above[:-1].argsort(stable=True)  # siblings side by side
    is_followed = above[order[:-1]] == above[order[1:]]
    siblings = torch.full_like(above, top)
    siblings[order[:-1][is_followed]] = order[1:][is_followed]
    nearest = torch.where(siblings < top, torch.arange(top + 1), above)
    for _ in jumps:
        nearest = nearest[nearest]
    return siblings[nearest[:-1]]


def _as_vector(name: str, values: Sequence[int] | Tensor) -> Tensor:
    """(M,) int64 on the CPU."""
    if not isinstance(values, Tensor):
        return torch.tensor(values, dtype=torch.int64)
    if values.dim() != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f"{name} must be one-dimensional integers, got {values.dtype} of shape "
            f"{tuple(values.shape)}; pass one integer per segment"
        )
    return values.to("cpu", torch.int64)


def _check_values(lengths: Tensor, parents: Tensor) -> None:
    if len(lengths) != len(parents):
        raise ValueError(
            f"lengths and parents must have one value per segment, got {len(lengths)} and "
            f"{len(parents)}; give every root the parent -1"
        )
    segment = _first(lengths < 0)
    if segment is not None:
        raise ValueError(
            f"lengths must be zero or more, got {int(lengths[segment])} for segment {segment}; "
            "an empty segment has length 0"
        )
    segment = _first((parents < -1) | (parents >= torch.arange(len(parents))))
    if segment is not None:
        raise ValueError(
            f"the parent of segment {segment} must be -1 or a segment before it, got "
            f"{int(parents[segment])}; put parents before their children"
        )


def _check_preorder(parents: Tensor, jumps: list[Tensor], levels: Tensor) -> None:
    """The segment before each one, or an ancestor of that, must be its parent."""
    steps = levels[:-2] - levels[1:-1] + 1
    found = climbed(torch.arange(len(parents))[:-1], steps, jumps)
    segment = _first(found != jumps[0][1:-1])
    if segment is not None:
        raise ValueError(
            f"segments must be in depth-first preorder, got segment {segment + 1} below segment "
            f"{int(parents[segment + 1])}, whose subtree has already ended; put each child "
            "straight after its parent or its sibling's subtree"
        )


def _first(wrong: Tensor) -> int | None:
    """Index of the first True, if any."""
    return int(wrong.nonzero()[0, 0]) if bool(wrong.any()) else None
