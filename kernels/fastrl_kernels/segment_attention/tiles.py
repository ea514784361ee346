"""The tables that drive the attention kernels: which tiles a row has, and what each one reads.

N packed tokens, M segments, H query heads, Hkv key heads. A tile never straddles two segments, so
what a token gets depends on its own path alone: its bits are the same in every row. The tables are
made on the CPU, from numbers that it has, and moved to the device once for all layers of a kind:
only that copy waits for the device, and nothing is read back.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastrl_kernels.segments import Segments, climb, climbed

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
    """The tables of a forest with at least one token, on its device."""
    device, forest = segments.ends.device, segments.host
    paths, path_starts = _paths(forest)
    units, splits, num_slots = _key_units(forest, sizes)
    return Tiles(
        paths=paths.to(device),
        query_tiles=_query_tiles(forest, sizes.query_tile, path_starts).to(device),
        key_units=units.to(device),
        key_splits=splits.to(device),
        positions=segments.positions.to(torch.int32),
        num_slots=num_slots,
    )


def _paths(segments: Segments) -> tuple[Tensor, Tensor]:
    """The entries of all paths, and (M + 1,) where the path of each segment starts."""
    jumps, levels = climb(segments.parents)
    ends = levels[:-1].cumsum(0)
    owner = torch.repeat_interleave(levels[:-1])
    steps = ends[owner] - 1 - torch.arange(len(owner))
    node = climbed(owner, steps, jumps)
    columns = (segments.starts[node], segments.lengths[node], segments.depths[node])
    return _table(*columns), torch.nn.functional.pad(ends, (1, 0))


def _query_tiles(segments: Segments, size: int, path_starts: Tensor) -> Tensor:
    """Tiles of queries, the deepest first."""
    segment, offset = _tiles(segments, size)
    depth = segments.depths[segment] + offset
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
    tile = torch.repeat_interleave(num_units)
    index = torch.arange(len(tile)) - (num_units.cumsum(0) - num_units)[tile]
    begins = index * size[tile]
    units = _table(
        first[tile], num_keys[tile], (segments.depths[segment] + offset)[tile],
        ends[tile], steps_per_head[tile], begins, torch.minimum(begins + size[tile], steps[tile]),
        torch.where(num_units[tile] > 1, slots[tile] + index, -1),
    )  # fmt: skip
    units = units[torch.argsort(size[tile], descending=True, stable=True)]
    splits = _table(first, num_keys, slots, num_units)[num_units > 1]
    return units, splits, int(num_slots.sum())


def _tiles(segments: Segments, size: int) -> tuple[Tensor, Tensor]:
    """Segment, and index of the first token in it, of every tile of `size` tokens."""
    counts = _ceil_div(segments.lengths, size)
    segment = torch.repeat_interleave(counts)
    index = torch.arange(len(segment))
    return segment, (index - (counts.cumsum(0) - counts)[segment]) * size


def _table(*columns: Tensor) -> Tensor:
    return torch.stack(columns, dim=1).to(torch.int32)


def _ceil_div(size: Tensor, block: Tensor | int) -> Tensor:
    return (size + block - 1) // block
