"""Trees that are too large for one pass: which sequences go together, and their plans.

Legend: B sequences, M segments of their prefix tree.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.packing.groups import MIN_TOKEN_RATIO
from fastrl.packing.plan import Plan
from fastrl.packing.trees import pack_tree, trained_tree
from fastrl.prefix_tree import PrefixTree


class TreePass(NamedTuple):
    """Sequences that are packed together."""

    sequences: list[int]
    num_repeated_tokens: int  # packed tokens that an earlier pass has too


def pack_tree_passes(
    sequences: Sequence[Tensor], trained: Sequence[Tensor] | None = None, *,
    max_tokens_per_pass: int, head_row_cost: float = 0.0,
    min_token_ratio: float = MIN_TOKEN_RATIO,
) -> list[Plan]:  # fmt: skip
    """`pack_tree` in as many rows as it takes: summed over them, losses and gradients are the same.

    Each row has at most `max_tokens_per_pass` tokens; `head_row_cost`: what the row of a trained
    token at the head takes of that, in packed tokens. Subtrees stay whole where they fit. One that
    does not is split at its branches, and every further row repeats the prefix of its sequences:
    `num_repeated_tokens` says how much. No sequence is cut.

    Every plan numbers completions as the caller does: `completion_index` is among all B sequences,
    and `scatter` gives a tensor for each of them, empty for those of other rows.
    """
    tokens, tree, is_shared = trained_tree(sequences, trained, min_token_ratio=min_token_ratio)
    passes = split_tree_into_passes(
        tree, (tokens.counts * head_row_cost).tolist(), max_tokens_per_pass=max_tokens_per_pass
    )
    plans = []
    for members, num_repeated_tokens in passes:
        chosen, masks = [_NO_TOKENS] * len(sequences), [_NO_MASK] * len(sequences)
        for b in members:
            chosen[b] = sequences[b]
            masks[b] = _NO_MASK if trained is None else trained[b]
        plan = pack_tree(
            chosen,
            None if trained is None else masks,
            # Decided once: a row that shared less than it was counted for would break its budget.
            min_token_ratio=1.0 if is_shared else math.inf,
        )
        plans.append(dataclasses.replace(plan, num_repeated_tokens=num_repeated_tokens))
    return plans


def split_tree_into_passes(
    tree: PrefixTree, head_tokens: Sequence[float], *, max_tokens_per_pass: int
) -> list[TreePass]:
    """Cut a forest into passes of at most `max_tokens_per_pass` packed tokens, in its order.

    head_tokens: (B,) what the head's rows of each sequence take of the budget. A subtree that fits
    into what is left of a pass goes there, else into a new pass, else each of its branches does. A
    tree that has to be split begins a pass. Sequences without tokens are left out.
    """
    facts = _facts(tree, head_tokens)
    last_pass: list[int | None] = [None] * len(tree.lengths)  # that has the segment
    passes: list[TreePass] = []
    room = 0.0
    waiting = [_subtree(tree, facts, s) for s in facts.children[-1]][::-1]
    while waiting:
        piece = waiting.pop()
        path = _path(tree, piece.above)
        missing = [s for s in path if last_pass[s] != len(passes) - 1]
        cost = piece.cost + sum(tree.lengths[s] for s in missing)
        if cost > room:
            missing, cost = path, piece.cost + sum(tree.lengths[s] for s in path)
            if cost > max_tokens_per_pass:
                waiting += _parts(tree, facts, piece, cost, max_tokens_per_pass)[::-1]
                room = 0.0 if piece.above < 0 else room
                continue
            passes.append(TreePass([], 0))
            room = max_tokens_per_pass
        room -= cost
        last = passes[-1]
        last.sequences.extend(piece.sequences)
        repeated = sum(tree.lengths[s] for s in missing if last_pass[s] is not None)
        passes[-1] = last._replace(num_repeated_tokens=last.num_repeated_tokens + repeated)
        for segment in (*missing, *piece.segments):
            last_pass[segment] = len(passes) - 1
    return passes


class _Piece(NamedTuple):
    """What goes into one pass if it fits: a subtree, or a sequence that ends within a tree."""

    above: int  # the segment whose path it continues, -1 for none
    segments: range  # of its own
    sequences: list[int]
    cost: float  # tokens of its own segments, and rows at the head


class _Facts(NamedTuple):
    """Of every segment of a forest, and where it has one more entry, of what is above its roots."""

    children: list[list[int]]  # M + 1
    ends: list[int]  # one past the last segment below
    costs: list[float]  # tokens and head rows of the segment and of everything below it
    order: list[int]  # the sequences that have tokens, by the segment they end with
    leaves: list[int]  # that segment
    head_tokens: Sequence[float]  # of every sequence


def _facts(tree: PrefixTree, head_tokens: Sequence[float]) -> _Facts:
    order = sorted(
        (b for b, leaf in enumerate(tree.leaves) if leaf >= 0), key=tree.leaves.__getitem__
    )
    costs = [float(length) for length in tree.lengths]
    for b in order:
        costs[tree.leaves[b]] += head_tokens[b]
    ends = list(range(1, len(costs) + 1))
    children: list[list[int]] = [[] for _ in range(len(costs) + 1)]
    for segment, parent in enumerate(tree.parents):
        children[parent].append(segment)
    for segment in reversed(range(len(costs))):
        parent = tree.parents[segment]
        if parent >= 0:
            costs[parent] += costs[segment]
            ends[parent] = max(ends[parent], ends[segment])
    return _Facts(children, ends, costs, order, [tree.leaves[b] for b in order], head_tokens)


def _subtree(tree: PrefixTree, facts: _Facts, segment: int) -> _Piece:
    """A segment with everything below it."""
    end = facts.ends[segment]
    first, last = bisect_left(facts.leaves, segment), bisect_left(facts.leaves, end)
    return _Piece(
        tree.parents[segment], range(segment, end), facts.order[first:last], facts.costs[segment]
    )


def _parts(
    tree: PrefixTree, facts: _Facts, piece: _Piece, cost: float, max_tokens_per_pass: int
) -> list[_Piece]:
    """The sequences that end with the first segment of a piece, then the subtrees below it."""
    if not piece.segments:
        raise ValueError(
            f"expected a sequence within max_tokens_per_pass {max_tokens_per_pass}, got {cost:.0f} "
            f"tokens for sequence {piece.sequences[0]}; raise it"
        )
    segment = piece.segments[0]
    first, last = bisect_left(facts.leaves, segment), bisect_left(facts.leaves, segment + 1)
    alone = [_Piece(segment, range(0), [b], facts.head_tokens[b]) for b in facts.order[first:last]]
    return alone + [_subtree(tree, facts, child) for child in facts.children[segment]]


def _path(tree: PrefixTree, segment: int) -> list[int]:
    """The segment and all above it, none for -1."""
    path = []
    while segment >= 0:
        path.append(segment)
        segment = tree.parents[segment]
    return path


_NO_TOKENS = torch.empty(0, dtype=torch.int64)
_NO_MASK = torch.empty(0, dtype=torch.bool)
