"""Token sequences and explicit trees as one packed row in which every shared prefix stands once.

Legend: B sequences, M segments, N packed tokens, S trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.packing.groups import MIN_TOKEN_RATIO
from fastrl.packing.plan import Plan
from fastrl.packing.tokens import (
    TrainedTokens,
    check_masks,
    check_token_ids,
    lengths_of,
    ranges,
    trained_tokens,
)
from fastrl.prefix_tree import depth_first, prefix_tree, separate_rows
from fastrl_kernels.segments import Segments, make_segments


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
    `target_ids`. The hidden state is computed once; only its row at the head is repeated. So each
    sequence keeps its own advantage, ratio and clip. One row with the sum of the weights would be
    cheaper and wrong where the sequences' advantages differ in sign: a clip drops one side's
    gradient and keeps the other's, which no sum of weights can say.
    """
    check_token_ids(sequences)
    lengths = lengths_of(sequences)
    if trained is None:
        trained = [torch.arange(len(sequence)) > 0 for sequence in sequences]
    check_masks(trained, sequences)
    tokens = trained_tokens(trained, lengths)
    _check_predicted(tokens.offsets == 0, tokens.owners, "sequence")
    needed = tokens.needed.tolist()
    tree = prefix_tree(sequences, needed)
    if sum(needed) < min_token_ratio * sum(tree.lengths):
        tree = separate_rows(needed)
    segments = make_segments(tree.lengths, tree.parents)
    flat = torch.cat(list(sequences))
    starts = (lengths.cumsum(0) - lengths)[tree.owners] + torch.tensor(tree.offsets)
    return Plan(
        input_ids=flat[ranges(starts, segments.lengths)],
        segments=segments,
        source_index=_on_paths(segments, tree.leaves, tokens),
        target_ids=flat[tokens.flat_index],
        completion_index=tokens.owners,
        completion_lengths=tuple(tokens.counts.tolist()),
        num_unshared_tokens=sum(needed),
    )


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
    lengths = lengths_of(token_ids)
    depths = _depths(lengths.tolist(), parents)
    if trained is None:
        trained = [
            torch.arange(depth, depth + len(ids)) > 0
            for depth, ids in zip(depths, token_ids, strict=True)
        ]
    check_masks(trained, token_ids)
    tokens = trained_tokens(trained, lengths)
    begins = tokens.offsets + torch.tensor(depths)[tokens.owners] == 0
    _check_predicted(begins, tokens.owners, "segment")
    return _pack_forest(token_ids, parents, depths, tokens)


def _pack_forest(
    token_ids: Sequence[Tensor], parents: Sequence[int], depths: Sequence[int],
    tokens: TrainedTokens,
) -> Plan:  # fmt: skip
    """The plan of a checked forest: the segments that are needed, in depth-first preorder."""
    lengths = lengths_of(token_ids)
    is_needed, has_children = _needed_segments(parents, tokens.counts.tolist())
    order = [s for s in depth_first(parents, range(len(parents))) if is_needed[s]]
    number = {segment: index for index, segment in enumerate(order)} | {-1: -1}
    inputs = torch.where(torch.tensor(has_children), lengths, tokens.needed)
    kept = torch.tensor(order)
    segments = make_segments(inputs[kept], [number[parents[s]] for s in order])
    starts = torch.zeros_like(lengths).index_copy(0, kept, segments.starts)
    flat = torch.cat(list(token_ids))
    rows = inputs.tolist()
    return Plan(
        input_ids=flat[ranges((lengths.cumsum(0) - lengths)[kept], segments.lengths)],
        segments=segments,
        source_index=torch.where(
            tokens.offsets > 0,
            starts[tokens.owners] + tokens.offsets - 1,
            _tokens_before(starts.tolist(), rows, parents)[tokens.owners],
        ),
        target_ids=flat[tokens.flat_index],
        completion_index=tokens.owners,
        completion_lengths=tuple(tokens.counts.tolist()),
        num_unshared_tokens=sum(depths[s] + rows[s] for s in order if not has_children[s]),
    )


def _on_paths(segments: Segments, leaves: Sequence[int], tokens: TrainedTokens) -> Tensor:
    """(S,) the packed position before each trained token, on the path to its sequence's leaf."""
    levels = [torch.tensor(leaves)]
    while (levels[-1] >= 0).any():
        segment = levels[-1]
        levels.append(torch.where(segment >= 0, segments.parents[segment], -1))
    paths = torch.stack(levels[::-1], dim=1)  # (B, depth), -1 before the root
    runs = paths[paths >= 0]
    # All paths one after the other, cut into runs of adjacent packed tokens.
    run_lengths = segments.lengths[runs]
    run_ends = run_lengths.cumsum(0)
    path_starts = tokens.needed.cumsum(0) - tokens.needed
    before = path_starts[tokens.owners] + tokens.offsets - 1
    run = torch.searchsorted(run_ends, before, right=True)
    return (segments.starts[runs] - (run_ends - run_lengths))[run] + before


def _depths(lengths: Sequence[int], parents: Sequence[int]) -> list[int]:
    """(M,) tokens on the path before each segment."""
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + lengths[parent] if parent >= 0 else 0)
    return depths


def _needed_segments(
    parents: Sequence[int], num_trained: Sequence[int]
) -> tuple[list[bool], list[bool]]:
    """Whether a segment or one below it has trained tokens, and whether one below it has."""
    is_needed = [count > 0 for count in num_trained]
    has_children = [False] * len(parents)
    for segment in reversed(range(len(parents))):
        if is_needed[segment] and parents[segment] >= 0:
            is_needed[parents[segment]] = has_children[parents[segment]] = True
    return is_needed, has_children


def _tokens_before(starts: Sequence[int], lengths: Sequence[int], parents: Sequence[int]) -> Tensor:
    """(M,) the packed position of the last token on the path before each segment, -1 for none."""
    before: list[int] = []
    for parent in parents:
        if parent >= 0 and lengths[parent] > 0:
            before.append(starts[parent] + lengths[parent] - 1)
        else:
            before.append(before[parent] if parent >= 0 else -1)
    return torch.tensor(before)


def _check_predicted(begins: Tensor, owners: Tensor, name: str) -> None:
    """Refuse to train on the first token of a path."""
    if begins.any():
        raise ValueError(
            f"expected an untrained first token, which nothing predicts, got a trained one in "
            f"{name} {int(owners[begins][0])}"
        )


def _check_parents(parents: Sequence[int], *, num_segments: int) -> None:
    if len(parents) != num_segments:
        raise ValueError(
            f"expected one parent per segment, got {len(parents)} parents for {num_segments} "
            "segments; the parent of a root is -1"
        )
    for segment, parent in enumerate(parents):
        if not -1 <= parent < num_segments:
            raise ValueError(
                f"expected -1 or a segment below {num_segments} as the parent of segment "
                f"{segment}, got {parent}"
            )
    for segment, parent in enumerate(parents):
        if parent < segment:
            continue
        above = parent
        for _ in range(num_segments):
            above = parents[above] if above not in (-1, segment) else above
        if above == segment:
            raise ValueError(f"expected a forest, got a cycle: segment {segment} is below itself")
        raise ValueError(
            f"expected parents before their children, got segment {parent} as the parent of "
            f"segment {segment}"
        )
