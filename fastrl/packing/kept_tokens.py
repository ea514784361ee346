"""A plan without the trained tokens that were dropped, and without what only they needed.

Legend: N packed tokens, M segments, S trained tokens.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.packing.tokens import needed_segments
from fastrl_kernels.segments import climb, make_segments

if TYPE_CHECKING:
    from fastrl.packing.plan import Plan


def keep_tokens(plan: Plan, kept: Tensor, *, trim: bool) -> Plan:
    """The plan with the trained tokens that `kept` (S,) bool says; see `Plan.keep_tokens`."""
    if kept.shape != plan.target_ids.shape or kept.dtype != torch.bool:
        raise ValueError(
            f"expected one bool per trained token, ({len(plan.target_ids)},), got "
            f"{tuple(kept.shape)} of {kept.dtype}"
        )
    if not bool(kept.any()):
        raise ValueError("expected at least one kept token, got none; skip the pass")
    completion_index = plan.completion_index[kept]
    counts = torch.bincount(completion_index, minlength=len(plan.completion_lengths))
    thinned = dataclasses.replace(
        plan,
        source_index=plan.source_index[kept],
        target_ids=plan.target_ids[kept],
        completion_index=completion_index,
        completion_lengths=tuple(counts.tolist()),
    )
    return _trimmed(thinned) if trim else thinned


def _trimmed(plan: Plan) -> Plan:
    """The plan without the packed tokens that no trained token is predicted from or sees.

    A segment is needed whole if one below it is, else up to its last source.
    """
    device = plan.input_ids.device
    segments, sources = plan.segments.host, plan.source_index.cpu()
    owners = torch.repeat_interleave(segments.lengths, output_size=segments.num_tokens)
    offsets = torch.arange(segments.num_tokens) - segments.starts[owners]
    last = torch.full_like(segments.lengths, -1)
    last.scatter_reduce_(0, owners[sources], offsets[sources], "amax")
    jumps, _ = climb(segments.parents)
    is_needed, has_children = needed_segments(last >= 0, jumps)
    lengths = torch.where(has_children, segments.lengths, last + 1)
    is_encoded = offsets < lengths[owners]
    places = is_encoded.cumsum(0) - 1
    number = torch.cat([is_needed.cumsum(0) - 1, torch.tensor([-1])])  # of a root's parent: -1
    rows = torch.zeros(len(plan.completion_lengths), dtype=torch.int64)
    rows.scatter_reduce_(0, plan.completion_index.cpu(), segments.positions[sources] + 1, "amax")
    return dataclasses.replace(
        plan,
        input_ids=plan.input_ids[is_encoded.to(device)],
        segments=make_segments(lengths[is_needed], number[segments.parents[is_needed]]).to(device),
        source_index=places[sources].to(device),
        num_unshared_tokens=int(rows.sum()),
        # What an earlier pass has too lies at the beginning of the row.
        num_repeated_tokens=int(is_encoded[: plan.num_repeated_tokens].sum()),
    )
