"""Completions, sequences and trees as packed rows in which every shared prefix stands once."""

from fastrl.packing.groups import MIN_TOKEN_RATIO, pack, pack_rows
from fastrl.packing.passes import (
    PackedPass,
    count_rollouts,
    pack_rollouts,
    split_cost,
    split_into_passes,
)
from fastrl.packing.plan import Plan
from fastrl.packing.shared_tokens import DistinctRows, distinct_rows
from fastrl.packing.tree_passes import TreePass, pack_tree_passes, split_tree_into_passes
from fastrl.packing.trees import pack_segments, pack_tree

__all__ = [
    "MIN_TOKEN_RATIO",
    "DistinctRows",
    "PackedPass",
    "Plan",
    "TreePass",
    "count_rollouts",
    "distinct_rows",
    "pack",
    "pack_rollouts",
    "pack_rows",
    "pack_segments",
    "pack_tree",
    "pack_tree_passes",
    "split_cost",
    "split_into_passes",
    "split_tree_into_passes",
]
