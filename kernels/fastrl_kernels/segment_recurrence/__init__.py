"""Recurrence over a forest of segments: every completion starts from the state of its prompt.

N packed tokens, B segments of a batch, T tokens of the longest of them. The segments of a level are
those with as many non-empty ancestors. They start from the states of the level above, and those of
similar length run side by side.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastrl_kernels.segment_recurrence.reference import segment_recurrence_reference
from fastrl_kernels.segment_recurrence.rule import Rule
from fastrl_kernels.segments import Segments
from fastrl_kernels.shared_rows import SharedRows, share_rows, take_rows

__all__ = ["Rule", "segment_recurrence", "segment_recurrence_reference"]

MAX_PADDING = 256
"""Lengths of a batch differ by less. One call for each segment, or one for all of a level, takes up
to twice as long on a CPU where completions are short, or of very different lengths."""


def segment_recurrence(inputs: Sequence[Tensor], rule: Rule, segments: Segments) -> Tensor:
    """Outputs (N, ...) of `rule` along the path of each token.

    inputs: (N, ...) each, N > 0. The gradients that the children of a segment send back to its
    state are summed in a fixed order, in float32 (float64 if the states are).
    """
    for x in inputs:
        if len(x) != segments.num_tokens:
            raise ValueError(
                f"inputs must hold the {segments.num_tokens} tokens of segments in their first "
                f"dimension, got {tuple(x.shape)}; drop the batch dimension"
            )
    schedule = _schedule(segments)
    in_order = (x.index_select(0, schedule.order).split(schedule.sizes) for x in inputs)
    rows = zip(*in_order, strict=True)
    states: Tensor | None = None
    outs = []
    for level in schedule.levels:
        above = None if states is None else take_rows(states, level.parents)
        after = []
        for batch in level.batches:
            before = None if above is None else above[batch.members]
            out, state = rule([_padded(x, batch) for x in next(rows)], before)
            outs.append(out.flatten(0, 1).index_select(0, batch.slots))
            after.append(state)
        states = torch.cat(after)
    return torch.cat(outs).index_select(0, schedule.way_back)


class _Batch(NamedTuple):
    """B segments that run side by side."""

    members: slice
    """Among the segments of the level."""
    slots: Tensor
    """Their tokens in the padded (B * T) rows."""
    shape: tuple[int, int]
    """B, T."""


class _Level(NamedTuple):
    parents: SharedRows
    """The segment of the level above that each one continues."""
    batches: list[_Batch]


class _Schedule(NamedTuple):
    levels: list[_Level]
    order: Tensor
    """(N,) int64: the tokens, batch after batch."""
    way_back: Tensor
    """(N,) int64: where each token is in that order."""
    sizes: list[int]
    """Tokens of each batch."""


def _padded(x: Tensor, batch: _Batch) -> Tensor:
    """(B, T, ...) rows of a batch, zeros behind the shorter segments."""
    num_segments, num_rows = batch.shape
    if len(x) < num_segments * num_rows:
        blank = x.new_zeros((num_segments * num_rows, *x.shape[1:]))
        x = blank.index_copy(0, batch.slots, x)
    return x.unflatten(0, batch.shape)


_cache: WeakKeyDictionary[Segments, _Schedule] = WeakKeyDictionary()


def _schedule(segments: Segments) -> _Schedule:
    """What runs when, and from which state; kept for the next layer as long as the forest lives."""
    if segments not in _cache:
        # Tables made under inference mode could not be saved for the backward of the update.
        with torch.inference_mode(False):
            _cache[segments] = _make_schedule(segments)
    return _cache[segments]


def _make_schedule(segments: Segments) -> _Schedule:
    host, device = segments.host, segments.lengths.device
    lengths, starts = host.lengths.tolist(), host.starts.tolist()
    levels: list[_Level] = []
    order: list[Tensor] = []
    sizes: list[int] = []
    places = {-1: 0}  # of the segments of the level above; roots start from no state
    for members, parents in _members_of_levels(lengths, host.parents.tolist()):
        shared = share_rows([places[parents[segment]] for segment in members], device)
        batches = []
        for _, similar in groupby(enumerate(members), lambda item: lengths[item[1]] // MAX_PADDING):
            numbers, batch = zip(*similar, strict=True)
            order += [torch.arange(starts[s], starts[s] + lengths[s]) for s in batch]
            sizes.append(sum(lengths[segment] for segment in batch))
            batches.append(_make_batch(numbers[0], [lengths[segment] for segment in batch], device))
        levels.append(_Level(shared, batches))
        places = {segment: place for place, segment in enumerate(members)}
    tokens = torch.cat(order)
    way_back = torch.empty_like(tokens).index_copy(0, tokens, torch.arange(len(tokens)))
    return _Schedule(levels, tokens.to(device), way_back.to(device), sizes)


def _members_of_levels(
    lengths: list[int], parents: list[int]
) -> list[tuple[list[int], dict[int, int]]]:
    """For each level its segments, the shortest first, and for each of them the one of the level
    above whose state it starts from, -1 for none."""
    holders: list[tuple[int, int]] = []  # level and index of whose state is behind each segment
    levels: list[tuple[list[int], dict[int, int]]] = []
    for segment, parent in enumerate(parents):
        level, holder = holders[parent] if parent >= 0 else (-1, -1)
        if lengths[segment]:
            level += 1
            if level == len(levels):
                levels.append(([], {}))
            levels[level][0].append(segment)
            levels[level][1][segment] = holder
            holder = segment
        holders.append((level, holder))
    for members, _ in levels:
        members.sort(key=lambda segment: lengths[segment] // MAX_PADDING)
    return levels


def _make_batch(first: int, lengths: list[int], device: torch.device) -> _Batch:
    num_rows = max(lengths)
    starts = range(0, num_rows * len(lengths), num_rows)
    slots = [torch.arange(s, s + length) for s, length in zip(starts, lengths, strict=True)]
    return _Batch(
        members=slice(first, first + len(lengths)),
        slots=torch.cat(slots).to(device),
        shape=(len(lengths), num_rows),
    )
