"""Token sequences and explicit trees as one packed row in which every shared prefix stands once.

Legend: B sequences, M segments, N packed tokens, S trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrl.packing.groups import MIN_TOKEN_RATIO
from fastrl.packing.plan import Plan
from fastrl.packing.tokens import (
    TrainedTokens,
    check_token_ids,
    flat_mask,
    lengths_of,
    needed_segments,
    ranges,
    trained_tokens,
)
from fastrl.prefix_tree import PrefixTree, depth_first, prefix_tree, separate_rows
from fastrl_kernels.segments import Segments, climb, climbed, make_segments, path_lengths


def pack_tree(
    sequences: Sequence[Tensor], trained: Sequence[Tensor] | None = None, *,
    min_token_ratio: float = MIN_TOKEN_RATIO,
) -> Plan:  # fmt: skip
    """Pack B whole sequences into one row that holds their longest common prefixes once.

    sequences: B int64 vectors of any length, zero included; trained: for each a bool mask of the
    tokens to train on, for instance the turns of the assistant (None: all but the first token,
    which nothing predicts). What no trained token depends on is not encoded: what follows the last
    one of a sequence, and sequences without any. Where sharing would shorten the row by less than
    `min_token_ratio`, every sequence is a plain row of its own. 1 shares always.

    A token that several sequences share and train is there once per sequence in `source_index` and
    `target_ids`. The hidden state is computed once; only its row at the head is repeated, so that
    each sequence has its own advantage, ratio and clip. `Plan.distinct_rows` runs the head once per
    row all the same, `fastrl.merged_tokens` has two rows each for a loss in one pass. A row that is
    too long for one pass: `pack_tree_passes`.
    """
    tokens, tree, _ = trained_tree(sequences, trained, min_token_ratio=min_token_ratio)
    lengths = lengths_of(sequences)
    segments = make_segments(tree.lengths, tree.parents)
    flat = torch.cat(list(sequences))
    starts = (lengths.cumsum(0) - lengths)[tree.owners] + torch.tensor(tree.offsets)
    return Plan(
        input_ids=flat.index_select(0, ranges(starts, segments.lengths)),
        segments=segments,
        source_index=_on_paths(segments, tree.leaves, tokens, lengths),
        target_ids=flat.index_select(0, tokens.flat_index),
        completion_index=tokens.owners,
        completion_lengths=tuple(tokens.counts.tolist()),
        num_unshared_tokens=int(tokens.needed.sum()),
    )


class TrainedTree(NamedTuple):
    """The forest of B sequences as far as their trained tokens need it."""

    tokens: TrainedTokens
    tree: PrefixTree
    is_shared: bool


def trained_tree(
    sequences: Sequence[Tensor], trained: Sequence[Tensor] | None, *, min_token_ratio: float
) -> TrainedTree:
    """Check what `pack_tree` takes, and decide whether anything is shared."""
    check_token_ids(sequences)
    lengths = lengths_of(sequences)
    mask = flat_mask(trained, sequences, lengths, torch.ones_like(lengths) > 0, name="sequence")
    tokens = trained_tokens(mask, lengths)
    needed = tokens.needed.tolist()
    tree = prefix_tree(sequences, needed)
    is_shared = sum(needed) >= min_token_ratio * sum(tree.lengths)
    return TrainedTree(tokens, tree if is_shared else separate_rows(needed), is_shared)


def pack_segments(
    token_ids: Sequence[Tensor], parents: Sequence[int], trained: Sequence[Tensor] | None = None
) -> Plan:
    """Pack an explicit forest of M segments: search trees, branches of a dialogue.

    token_ids: M int64 vectors of any length, zero included; parents: for each the index of the
    segment that it continues, -1 for a root, parents before their children and otherwise in any
    order; trained: for each a bool mask (None: all tokens but the first ones of the roots).
    Untrained branches and what follows the last trained token of a branch are not encoded.

    The plan's completions are the segments, in the caller's order. A trained token counts once, for
    its segment, however many branches pass through it; where branches disagree on its advantage,
    use `pack_tree` with one sequence per branch. `num_unshared_tokens` is that of one row per leaf.
    """
    check_token_ids(token_ids)
    _check_parents(parents, num_segments=len(token_ids))
    lengths, above = lengths_of(token_ids), torch.tensor(parents, dtype=torch.int64)
    jumps, _ = climb(above)
    depths = path_lengths(lengths, jumps) - lengths
    mask = flat_mask(trained, token_ids, lengths, depths == 0, name="segment")
    tokens = trained_tokens(mask, lengths)
    is_needed, has_children = needed_segments(tokens.counts > 0, jumps)
    order = torch.tensor(depth_first(parents, range(len(parents))))
    kept = order[is_needed[order]]
    number = torch.full((len(parents) + 1,), -1).index_copy_(0, kept, torch.arange(len(kept)))
    inputs = torch.where(has_children, lengths, tokens.needed)
    segments = make_segments(inputs[kept], number[jumps[0][kept]])
    starts = torch.zeros_like(lengths).index_copy_(0, kept, segments.starts)
    flat = torch.cat(list(token_ids))
    places = ranges((lengths.cumsum(0) - lengths)[kept], segments.lengths)
    return Plan(
        input_ids=flat.index_select(0, places),
        segments=segments,
        source_index=torch.where(
            tokens.offsets > 0,
            (starts - 1).index_select(0, tokens.owners) + tokens.offsets,
            _tokens_before(starts, inputs, jumps).index_select(0, tokens.owners),
        ),
        target_ids=flat.index_select(0, tokens.flat_index),
        completion_index=tokens.owners,
        completion_lengths=tuple(tokens.counts.tolist()),
        num_unshared_tokens=int((depths + inputs)[is_needed & ~has_children].sum()),
    )


def _on_paths(
    segments: Segments, leaves: Sequence[int], tokens: TrainedTokens, lengths: Tensor
) -> Tensor:
    """(S,) the packed position before each trained token, on the path to its sequence's leaf.

    lengths: (B,) of the sequences. All paths one after the other are runs of adjacent packed
    tokens; a token is predicted from within a run iff its own place is one further.
    """
    jumps, levels = climb(segments.parents)
    ends = torch.tensor(leaves)
    num_runs = levels[ends]  # of each path; the node -1 stands above all roots and has none
    sequence = torch.repeat_interleave(num_runs)
    steps = num_runs.cumsum(0)[sequence] - 1 - torch.arange(len(sequence))
    run = climbed(ends[sequence], steps, jumps)
    first = (lengths.cumsum(0) - lengths)[sequence] + 1 + segments.depths[run]
    shifts = segments.starts[run] - segments.depths[run]
    counts = tokens.num_before[first + segments.lengths[run]] - tokens.num_before[first]
    return shifts.repeat_interleave(counts, output_size=len(tokens.offsets)) + tokens.offsets - 1


def _tokens_before(starts: Tensor, lengths: Tensor, jumps: list[Tensor]) -> Tensor:
    """(M,) the packed position of the last token on the path before each segment, -1 for none."""
    top = len(starts)
    ends = pad(starts + lengths, (0, 1))
    # The nearest segment on the path that has tokens, each segment itself counted.
    nearest = torch.where(pad(lengths, (0, 1)) > 0, torch.arange(top + 1), jumps[0])
    for _ in jumps:
        nearest = nearest[nearest]
    return ends[nearest[jumps[0][:-1]]] - 1


def _check_parents(parents: Sequence[int], *, num_segments: int) -> None:
    if len(parents) != num_segments:
        raise ValueError(
            f"expected one parent per segment, got {len(parents)} parents for {num_segments} "
            "segments; the parent of a root is -1"
        )
    segment = next((s for s, parent in enumerate(parents) if not -1 <= parent < s), None)
    if segment is None:
        return
    parent = parents[segment]
    if not -1 <= parent < num_segments:
        raise ValueError(
            f"expected -1 or a segment below {num_segments} as the parent of segment {segment}, "
            f"got {parent}"
        )
    above = parent
    for _ in range(num_segments):
        above = parents[above] if above != segment and 0 <= above < num_segments else above
    if above == segment:
        raise ValueError(f"expected a forest, got a cycle: segment {segment} is below itself")
    raise ValueError(
        f"expected parents before their children, got segment {parent} as the parent of "
        f"segment {segment}"
    )
