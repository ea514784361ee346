"""Recurrence over a forest of segments: every completion starts from the state of its prompt.

N packed tokens, B segments of a level, T tokens of the longest of them. The segments of a level are
those with as many non-empty ancestors; they run side by side, from the states of the level above.
"""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastrl_kernels.segment_recurrence.reference import segment_recurrence_reference
from fastrl_kernels.segment_recurrence.rule import Rule
from fastrl_kernels.segments import Segments
from fastrl_kernels.shared_rows import SharedRows, share_rows, take_rows

__all__ = ["Rule", "segment_recurrence", "segment_recurrence_reference"]


def segment_recurrence(inputs: Sequence[Tensor], rule: Rule, segments: Segments) -> Tensor:
    """Outputs (N, ...) of `rule` along the path of each token.

    inputs: (N, ...) each. The gradients that the children of a segment send back to its state are
    summed in a fixed order, in float32 (float64 if the states are).
    """
    for x in inputs:
        if len(x) != segments.num_tokens:
            raise ValueError(
                f"inputs must hold the {segments.num_tokens} tokens of segments in their first "
                f"dimension, got {tuple(x.shape)}; drop the batch dimension"
            )
    levels, order = _levels(segments)
    states: Tensor | None = None
    outs = []
    for level in levels:
        before = None if states is None else take_rows(states, level.parents)
        out, states = rule([_padded(x, level) for x in inputs], before)
        outs.append(out.flatten(0, 1).index_select(0, level.slots))
    return torch.cat(outs).index_select(0, order)


class _Level(NamedTuple):
    """B segments that run side by side."""

    rows: Tensor
    """Their tokens in the packed row."""
    slots: Tensor
    """The same tokens in the padded (B * T) rows."""
    shape: tuple[int, int]
    """B, T."""
    parents: SharedRows
    """The segment of the level above that each one continues."""


def _padded(x: Tensor, level: _Level) -> Tensor:
    """(B, T, ...) rows of a level, zeros behind the shorter segments."""
    num_segments, num_rows = level.shape
    own = x.index_select(0, level.rows)
    if len(own) < num_segments * num_rows:
        blank = own.new_zeros((num_segments * num_rows, *own.shape[1:]))
        own = blank.index_copy(0, level.slots, own)
    return own.unflatten(0, level.shape)


_cache: WeakKeyDictionary[Segments, tuple[list[_Level], Tensor]] = WeakKeyDictionary()


def _levels(segments: Segments) -> tuple[list[_Level], Tensor]:
    """The levels of a forest and (N,) the way back from their order to that of the row.

    Kept for the next layer as long as the forest lives.
    """
    if segments not in _cache:
        # Tables made under inference mode could not be saved for the backward of the update.
        with torch.inference_mode(False):
            levels = _make_levels(segments)
            _cache[segments] = levels, torch.cat([level.rows for level in levels]).argsort()
    return _cache[segments]


def _make_levels(segments: Segments) -> list[_Level]:
    members: list[list[int]] = []  # segments of each level
    parents: list[list[int]] = []  # and whom of the level above they continue
    place: list[tuple[int, int]] = []  # level and index of the segment that holds the state
    lengths = segments.host.lengths.tolist()
    for segment, parent in enumerate(segments.host.parents.tolist()):
        level, index = place[parent] if parent >= 0 else (-1, -1)
        if lengths[segment]:
            level += 1
            if level == len(members):
                members.append([])
                parents.append([])
            members[level].append(segment)
            parents[level].append(index)
            index = len(members[level]) - 1
        place.append((level, index))
    return [_make_level(segments, *level) for level in zip(members, parents, strict=True)]


def _make_level(segments: Segments, members: list[int], parents: list[int]) -> _Level:
    host, device, chosen = segments.host, segments.lengths.device, torch.tensor(members)
    lengths, num_segments = host.lengths[chosen], len(members)
    num_rows = int(lengths.max())
    firsts = lengths.cumsum(0) - lengths
    step = torch.arange(int(lengths.sum())) - firsts.repeat_interleave(lengths)
    rows = host.starts[chosen].repeat_interleave(lengths) + step
    slots = (num_rows * torch.arange(num_segments)).repeat_interleave(lengths) + step
    return _Level(
        rows=rows.to(device),
        slots=slots.to(device),
        shape=(num_segments, num_rows),
        parents=share_rows(parents, device),
    )
