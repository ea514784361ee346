"""The forest of longest common prefixes against a trie that is grown token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.prefix_tree import PrefixTree, depth_first, prefix_tree, separate_rows

Forest = list[tuple[tuple[int, ...], "Forest"]]  # tokens of a segment and what continues it


def tree_of(sequences: list[list[int]]) -> PrefixTree:
    vectors = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return prefix_tree(vectors, list(map(len, sequences)))


def brute_force(sequences: list[list[int]]) -> Forest:
    """A trie of dictionaries with its unary chains joined where no sequence ends."""
    trie: dict = {}
    ends = {tuple(sequence) for sequence in sequences}
    for sequence in sequences:
        node = trie
        for token in sequence:
            node = node.setdefault(token, {})

    def compressed(node: dict, path: tuple[int, ...]) -> Forest:
        forest = []
        for token, child in node.items():  # in order of insertion, that of the sequences
            tokens = (token,)
            while len(child) == 1 and path + tokens not in ends:
                ((token, child),) = child.items()
                tokens += (token,)
            forest.append((tokens, compressed(child, path + tokens)))
        return forest

    return compressed(trie, ())


def as_forest(sequences: list[list[int]]) -> Forest:
    """The same picture of what `prefix_tree` returns."""
    tree = tree_of(sequences)
    children: dict[int, Forest] = {-1: []}
    for segment, parent in enumerate(tree.parents):
        start = tree.offsets[segment]
        tokens = sequences[tree.owners[segment]][start : start + tree.lengths[segment]]
        children[segment] = []
        children[parent].append((tuple(tokens), children[segment]))
    return children[-1]


few_tokens = st.lists(st.integers(0, 2) | st.just(2**40 + 1), max_size=7)


@settings(max_examples=150, deadline=None)
@given(st.lists(few_tokens, max_size=9))
def test_forest_is_that_of_a_trie(sequences):
    assert as_forest(sequences) == brute_force(sequences)
    tree = tree_of(sequences)
    assert all(parent < segment for segment, parent in enumerate(tree.parents))
    assert depth_first(tree.parents, range(len(tree.parents))) == list(range(len(tree.parents)))
    for sequence, leaf in zip(sequences, tree.leaves, strict=True):
        path: list[int] = []
        while leaf >= 0:
            start, owner = tree.offsets[leaf], tree.owners[leaf]
            path = sequences[owner][start : start + tree.lengths[leaf]] + path
            leaf = tree.parents[leaf]
        assert path == sequence


def test_a_dialogue_with_two_branches():
    """Prefixes of one another, a fork within a segment, an equal pair, a stranger, an empty one."""
    sequences = [[5, 6, 7, 8], [5, 6], [5, 6, 7, 9, 9], [3], [], [5, 6, 7, 8], [300, 5, 6]]
    tree = tree_of(sequences)
    assert tree.lengths == [2, 1, 1, 2, 1, 3]
    assert tree.parents == [-1, 0, 1, 1, -1, -1]
    assert tree.owners == [0, 0, 0, 2, 3, 6]
    assert tree.offsets == [0, 2, 3, 3, 0, 0]
    assert tree.leaves == [2, 0, 3, 4, -1, 2, 5]


def test_long_sequences_that_part_late():
    """Thousands of tokens in common: every token of the vectors takes part in the comparison."""
    generator = torch.Generator().manual_seed(0)
    trunk = torch.randint(0, 50000, (4097,), generator=generator)
    sequences = [trunk.clone() for _ in range(5)]
    for b, sequence in enumerate(sequences):
        sequence[4096 - b] += 1 + b
    tree = prefix_tree([*sequences, trunk], [4097] * 5 + [4000])
    assert sorted(tree.offsets[leaf] for leaf in tree.leaves) == [0, 4092, 4093, 4094, 4095, 4095]
    assert sum(tree.lengths) == 4097 + 2 + 3 + 4 + 5


def test_a_view_with_strides_is_read_as_its_values():
    sequence = torch.arange(10)[::2]
    assert prefix_tree([sequence, torch.tensor([0, 2, 4])], [5, 3]).lengths == [3, 2]


def test_separate_rows_share_nothing():
    tree = separate_rows([3, 0, 2])
    assert tree.lengths == [3, 2]
    assert tree.parents == [-1, -1]
    assert tree.owners == [0, 2]
    assert tree.leaves == [0, -1, 1]


@pytest.mark.parametrize(
    ("parents", "nodes", "order"),
    [
        ([-1, -1, 0, 1, 0], range(5), [0, 2, 4, 1, 3]),
        ([-1, -1, 0, 1, 0], [1, 3, 4, 0, 2], [1, 3, 0, 4, 2]),
        ([], [], []),
    ],
)
def test_depth_first_keeps_siblings_in_the_given_order(parents, nodes, order):
    assert depth_first(parents, nodes) == order
