"""The largest passes that a configuration can meet, without tokens.

Legend: N packed tokens, S trained tokens, M segments, P prompts, G completions of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.activations import smallest_pass
from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.memory.trained import Trained
from fastrl.packing import PackedPass, Plan
from fastrl.packing.groups import MIN_TOKEN_RATIO
from fastrl.packing.passes import split_into_passes
from fastrl.types import Batch
from fastrl_kernels import Segments, make_segments


class Work(NamedTuple):
    """What the memory of a pass depends on."""

    num_tokens: int  # N
    num_needed: int  # rows of the last layer that trained tokens are predicted from
    num_rows: int  # S
    segments: Segments  # on the CPU
    workspace_mb: float

    @property
    def numbers(self) -> tuple[int, int, int]:
        """What sizes of tensors are affine functions of."""
        return self[:3]

    def with_numbers(self, numbers: Sequence[int]) -> Work:
        """The same but for these."""
        num_tokens, num_needed, num_rows = numbers
        return self._replace(num_tokens=num_tokens, num_needed=num_needed, num_rows=num_rows)


class Passes(NamedTuple):
    """Of one optimizer step."""

    first: Work  # the largest
    next: Work | None
    """The largest of those that come when there are gradients already; None for a single pass."""


def largest_passes(config: Config, trained: Trained, head_row_cost: float) -> Passes:
    """Those of completions as long as they may be, and the first as full as shorter ones make it.

    head_row_cost: what the row of a trained token at the head takes, in packed tokens.
    """
    rollout, budget = config.rollout, config.max_tokens_per_pass
    length, size = rollout.max_prompt_length, rollout.max_completion_length
    needed = smallest_pass(length, size, head_row_cost)
    if needed > budget:
        raise InputError(
            f"max_tokens_per_pass must hold one prompt and completion with its rows at the head, "
            f"at least {needed} tokens, got {budget}"
        )
    counts = trained.sizes
    shared = len(counts) * length + sum(counts) * (size - 1)
    unshared = sum(counts) * (length + size - 1)
    is_shared = unshared >= MIN_TOKEN_RATIO * shared
    members = counts if is_shared else (1,) * sum(counts)
    passes = split_into_passes(
        [length] * len(members), [[size] * count for count in members],
        max_tokens_per_pass=budget, head_row_cost=head_row_cost,
    )  # fmt: skip
    groups = [[Group(length, [size] * len(some)) for _, some in pairs] for pairs in passes]
    if len(groups) > 1:
        following, some = passes[1][0]
        is_continued = passes[0][-1][0] == following
        more = Group(0, [1]) if is_continued else Group(length, [1] * len(some))
        _fill(groups[0], more, budget, head_row_cost)
    works = [
        _work(some, config.workspace_mb, trained.token_fraction, is_shared=is_shared)
        for some in groups[:2]
    ]
    if len(groups) == 1:
        return Passes(works[0], None)
    return Passes(works[0], works[1] if len(groups) == 2 else works[0])


class Group(NamedTuple):
    """Tokens of a prompt, and of those of its completions that are in a pass."""

    length: int
    sizes: list[int]


def _fill(groups: list[Group], more: Group, budget: int, head_row_cost: float) -> None:
    """Put completions as long as there is room for into a pass, where they find room at all.

    more: as many of them as there may be, behind a prompt of their own or of the last one.
    """
    used = sum(
        group.length + sum(size - 1 + head_row_cost * size for size in group.sizes)
        for group in groups
    )
    room = (budget - used - more.length) / len(more.sizes)
    size = math.floor((room + 1) / (1 + head_row_cost))
    if size < 1:
        return
    if more.length:
        groups.append(Group(more.length, []))
    groups[-1].sizes.extend([size] * len(more.sizes))


def _work(
    groups: Sequence[Group], workspace_mb: float, token_fraction: float, *, is_shared: bool
) -> Work:
    lengths, parents, num_rows = [], [], 0
    for group in groups:
        num_rows += sum(group.sizes)
        if not is_shared:
            lengths += [group.length + size - 1 for size in group.sizes]
            parents += [-1] * len(group.sizes)
            continue
        prompt = len(lengths)
        lengths += [group.length, *(size - 1 for size in group.sizes)]
        parents += [-1, *([prompt] * len(group.sizes))]
    num_tokens = sum(lengths)
    # The last token of a shared prompt predicts the first one of all its completions.
    num_shared = sum(len(group.sizes) - 1 for group in groups) if is_shared else 0
    num_needed, num_rows = num_rows - num_shared, math.ceil(token_fraction * num_rows)
    segments = make_segments(lengths, parents)
    return Work(num_tokens, min(num_needed, num_rows), num_rows, segments, workspace_mb)


def pass_on_meta(work: Work, *, has_reference: bool, dtype: torch.dtype) -> PackedPass:
    """A pass of this shape; dtype: of what stands beside each token."""
    host = work.segments

    def numbers(count: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    segments = Segments(
        lengths=host.lengths.to("meta"), parents=host.parents.to("meta"),
        starts=host.starts.to("meta"), subtree_ends=host.subtree_ends.to("meta"),
        ends=numbers(work.num_tokens, torch.int32), positions=numbers(work.num_tokens),
        depths=host.depths.to("meta"), on_cpu=host,
    )  # fmt: skip
    S = work.num_rows
    plan = Plan(
        input_ids=numbers(work.num_tokens), segments=segments, source_index=numbers(S),
        target_ids=numbers(S), completion_index=numbers(S), completion_lengths=(S,),
        num_unshared_tokens=work.num_tokens,
    )  # fmt: skip
    batch = Batch(
        input_ids=plan.input_ids, position_ids=plan.position_ids, segments=segments,
        source_index=plan.source_index, target_ids=plan.target_ids,
        completion_index=plan.completion_index, advantages=numbers(S, dtype),
        token_weights=numbers(S, dtype), old_logps=numbers(S, dtype),
        ref_logps=numbers(S, dtype) if has_reference else None,
    )  # fmt: skip
    return PackedPass(plan, batch)
