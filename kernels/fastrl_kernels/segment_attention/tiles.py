"""The tables that drive the attention kernels: which tiles a row has, and what each one reads.

N packed tokens, M segments, H query heads, Hkv key heads. A tile never straddles two segments, so
what a token gets depends on its own path alone: its bits are the same in every row. The tables are
made on the device of the segments, once for all layers of a kind; making them waits for the device,
launches do not.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastrl_kernels.segments import Segments

LEAST_STEPS = 4  # below, writing and adding up the sums of a unit costs more than its work


class Sizes(NamedTuple):
    """What the tables depend on besides the segments."""

    window: int | None  # tokens of the path that a query sees
    num_groups: int  # query heads that share a key head
    num_kv_heads: int
    query_tile: int  # queries whose outputs or gradients one program computes
    key_tile: int  # keys whose gradients one program computes
    query_step: int  # queries that it reads at a time
    num_programs: int  # among so many the gradients of the keys are to be divided


class Tiles(NamedTuple):
    """Tables of int32, one row an entry; programs take the rows in order, the longest first."""

    paths: Tensor
    """(sum of path lengths, 3): first token, number of tokens and position of the first, of every
    segment on the way from the root to each segment, that segment last."""
    query_tiles: Tensor
    """(T, 4): first token, its index in its segment, first and end entry of its path."""
    key_units: Tensor
    """(U, 8): first key, number of keys, position of the first, end of the queries that see any,
    steps for one query head, first and end of the unit's steps, slot for its sums or -1."""
    key_splits: Tensor
    """(X, 4) for keys shared out to several units: first key, number of keys, first slot, slots."""
    positions: Tensor
    """(N,): index of the token along its path."""
    num_slots: int
    """Units that leave their sums to be added up."""


_cache: WeakKeyDictionary[Segments, dict[Sizes, Tiles]] = WeakKeyDictionary()


def tiles_of(segments: Segments, sizes: Sizes) -> Tiles:
    """The tables of a forest; kept for the next layer as long as the forest lives."""
    known = _cache.setdefault(segments, {})
    if sizes not in known:
        # Tables made under inference mode could not be saved for the backward of the update.
        with torch.inference_mode(False):
            known[sizes] = make_tiles(segments, sizes)
    return known[sizes]


def make_tiles(segments: Segments, sizes: Sizes) -> Tiles:
    """The tables of a forest with at least one token."""
    paths, path_starts = _paths(segments)
    units, splits, num_slots = _key_units(segments, sizes)
    return Tiles(
        paths=paths,
        query_tiles=_query_tiles(segments, sizes.query_tile, path_starts),
        key_units=units,
        key_splits=splits,
        positions=segments.positions.to(torch.int32),
        num_slots=num_slots,
    )


def _paths(segments: Segments) -> tuple[Tensor, Tensor]:
    """The entries of all paths, and (M + 1,) where the path of each segment starts.

    Ancestors come from tables of the 1st, 2nd, 4th ... one, so any depth takes log2(M) steps.
    """
    num_segments = segments.num_segments
    above = torch.where(segments.parents < 0, num_segments, segments.parents)
    above = torch.nn.functional.pad(above, (0, 1), value=num_segments)  # what is above all roots
    depths = (torch.arange(num_segments + 1, device=above.device) < num_segments).long()
    jumps = []
    for _ in range(num_segments.bit_length()):
        jumps.append(above)
        depths = depths + depths[above]
        above = above[above]
    ends = depths[:-1].cumsum(0)
    owner = _repeated(depths[:-1])
    climb = ends[owner] - 1 - torch.arange(owner.shape[0], device=owner.device)
    node = owner
    for power, jump in enumerate(jumps):
        node = torch.where((climb >> power) % 2 == 1, jump[node], node)
    columns = (segments.starts[node], segments.lengths[node], _first_positions(segments)[node])
    return _table(*columns), torch.nn.functional.pad(ends, (1, 0))


def _query_tiles(segments: Segments, size: int, path_starts: Tensor) -> Tensor:
    """Tiles of queries, the deepest first."""
    segment, offset = _tiles(segments, size)
    depth = _first_positions(segments)[segment] + offset
    tiles = _table(
        segments.starts[segment] + offset, offset, path_starts[segment], path_starts[segment + 1]
    )
    return tiles[torch.argsort(depth, descending=True, stable=True)]


def _key_units(segments: Segments, sizes: Sizes) -> tuple[Tensor, Tensor, int]:
    """Units of work on tiles of keys, tiles of several units, and slots for these units.

    All queries from a key's own to the end of its subtree see it, so a tile's queries are one range
    of tokens. A prompt's is as long as all its completions, hence the division into units.
    """
    segment, offset = _tiles(segments, sizes.key_tile)
    first = segments.starts[segment] + offset
    num_keys = (segments.lengths[segment] - offset).clamp(max=sizes.key_tile)
    ends = segments.subtree_ends[segment]
    if sizes.window is not None:
        last_seen = first + num_keys - 1 + sizes.window
        own_end = segments.starts[segment] + segments.lengths[segment]
        ends = torch.where(last_seen <= own_end, last_seen, ends)
    steps_per_head = _ceil_div(ends - first, sizes.query_step)
    steps = steps_per_head * sizes.num_groups
    longest = _ceil_div(steps.sum() * sizes.num_kv_heads, sizes.num_programs)
    longest = longest.clamp(min=LEAST_STEPS)
    num_units = _ceil_div(steps, longest)
    size = _ceil_div(steps, num_units)

    num_slots = torch.where(num_units > 1, num_units, 0)
    slots = num_slots.cumsum(0) - num_slots
    tile = _repeated(num_units)
    index = (
        torch.arange(tile.shape[0], device=tile.device) - (num_units.cumsum(0) - num_units)[tile]
    )
    begins = index * size[tile]
    units = _table(
        first[tile], num_keys[tile], (_first_positions(segments)[segment] + offset)[tile],
        ends[tile], steps_per_head[tile], begins, torch.minimum(begins + size[tile], steps[tile]),
        torch.where(num_units[tile] > 1, slots[tile] + index, -1),
    )  # fmt: skip
    units = units[torch.argsort(size[tile], descending=True, stable=True)]
    splits = _table(first, num_keys, slots, num_units)[num_units > 1]
    return units, splits, int(num_slots.sum())


def _tiles(segments: Segments, size: int) -> tuple[Tensor, Tensor]:
    """Segment, and index of the first token in it, of every tile of `size` tokens."""
    counts = _ceil_div(segments.lengths, size)
    segment = _repeated(counts)
    index = torch.arange(segment.shape[0], device=segment.device)
    return segment, (index - (counts.cumsum(0) - counts)[segment]) * size


def _first_positions(segments: Segments) -> Tensor:
    """(M,) position of each segment's first token; of an empty segment, any."""
    return segments.positions[segments.starts.clamp(max=segments.num_tokens - 1)]


def _repeated(counts: Tensor) -> Tensor:
    """Indices, each as often as its count."""
    return torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts)


def _table(*columns: Tensor) -> Tensor:
    return torch.stack(columns, dim=1).to(torch.int32)


def _ceil_div(size: Tensor, block: Tensor | int) -> Tensor:
    return (size + block - 1) // block
