"""Sequences as a forest in which every common prefix stands once.

Legend: B sequences, M segments: the edges of the compressed trie (PATRICIA, Morrison 1968).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor


class PrefixTree(NamedTuple):
    """A forest of segments in depth-first preorder, siblings in the order of their sequences."""

    lengths: list[int]  # (M,) tokens of each segment, at least 1
    parents: list[int]  # (M,) the segment that this one continues, -1 for a root
    owners: list[int]  # (M,) the first sequence through the segment: its tokens are taken from it
    offsets: list[int]  # (M,) where in that sequence the segment begins
    leaves: list[int]  # (B,) the segment that a sequence ends with, -1 for an empty sequence


def prefix_tree(sequences: Sequence[Tensor], lengths: Sequence[int]) -> PrefixTree:
    """The forest of B sequences with their longest common prefixes shared.

    sequences: int64 vectors on the CPU; lengths: how many tokens of each to place, from its start.
    Sorting brings equal prefixes together; what a sequence shares with its neighbour is then all
    that the forest needs. Tokens are compared by sorting and by whole vectors, never one by one in
    Python. The same sequences in the same order give the same forest.
    """
    arrays = [
        sequence.numpy()[:length] for sequence, length in zip(sequences, lengths, strict=True)
    ]
    # Any order of the tokens will do, so that of their bytes in memory, which memcmp compares.
    keys = [array.tobytes() for array in arrays]
    order = sorted((b for b, key in enumerate(keys) if key), key=keys.__getitem__)
    common = [_common_length(arrays[a], arrays[b]) for a, b in pairwise(order)]
    ends, parents, leaves = _insert(order, common, lengths)
    return _in_order(ends, parents, leaves)


def separate_rows(lengths: Sequence[int]) -> PrefixTree:
    """The forest that shares nothing: every sequence of at least one token is a root."""
    owners = [b for b, length in enumerate(lengths) if length > 0]
    roots = {b: root for root, b in enumerate(owners)}
    return PrefixTree(
        lengths=[lengths[b] for b in owners],
        parents=[-1] * len(owners),
        owners=owners,
        offsets=[0] * len(owners),
        leaves=[roots.get(b, -1) for b in range(len(lengths))],
    )


def depth_first(parents: Sequence[int], nodes: Iterable[int]) -> list[int]:
    """The nodes of a forest in depth-first preorder, siblings in the order in which `nodes` has
    them.
    """
    roots: list[int] = []
    children: list[list[int]] = [[] for _ in parents]
    for node in nodes:
        (children[parents[node]] if parents[node] >= 0 else roots).append(node)
    order: list[int] = []
    waiting = roots[::-1]
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting += children[node][::-1]
    return order


def _common_length(a: Any, b: Any) -> int:
    """Tokens that two non-empty arrays have in common from their start."""
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    first = int(differs.argmax())
    return first if differs[first] else shorter


def _insert(
    order: Sequence[int], common: Sequence[int], lengths: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """End depth and parent of every node, and the last node of every sequence.

    order: the non-empty sequences sorted; common: what each but the first shares with the one
    before it; lengths: tokens of every sequence. `path` holds the nodes of the sequence before,
    root first: the new one leaves it where they part, in the midst of a node if need be.
    """
    ends: list[int] = []
    parents: list[int] = []
    leaves = [-1] * len(lengths)
    path: list[int] = []

    def add(end: int) -> int:
        ends.append(end)
        parents.append(path[-1] if path else -1)
        path.append(len(ends) - 1)
        return path[-1]

    for sequence, shared in zip(order, [0, *common], strict=False):
        left = -1
        while path and ends[path[-1]] > shared:
            left = path.pop()
        if shared > (ends[path[-1]] if path else 0):
            parents[left] = add(shared)
        if lengths[sequence] > shared:
            add(lengths[sequence])
        leaves[sequence] = path[-1]
    return ends, parents, leaves


def _in_order(ends: list[int], parents: list[int], leaves: list[int]) -> PrefixTree:
    """The forest renumbered in preorder, siblings by the first sequence through them."""
    owners: dict[int, int] = {}
    for sequence, leaf in enumerate(leaves):
        node = leaf
        while node >= 0 and node not in owners:
            owners[node] = sequence
            node = parents[node]
    order = depth_first(parents, owners)
    number = {node: segment for segment, node in enumerate(order)} | {-1: -1}
    offsets = [ends[parents[node]] if parents[node] >= 0 else 0 for node in order]
    return PrefixTree(
        lengths=[ends[node] - offset for node, offset in zip(order, offsets, strict=True)],
        parents=[number[parents[node]] for node in order],
        owners=[owners[node] for node in order],
        offsets=offsets,
        leaves=[number[leaf] for leaf in leaves],
    )
