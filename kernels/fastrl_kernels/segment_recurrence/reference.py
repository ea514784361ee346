"""A recurrence over a forest of segments, the obvious way: every path in full.

N packed tokens, T tokens of a path.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl_kernels.segment_recurrence.rule import Rule
from fastrl_kernels.segments import Segments


def segment_recurrence_reference(
    inputs: Sequence[Tensor], rule: Rule, segments: Segments
) -> Tensor:
    """`segment_recurrence` from one recurrence a segment, over its whole path."""
    own = zip(*(x.split(segments.lengths.tolist()) for x in inputs), strict=True)
    paths: list[list[Tensor]] = []
    outs = []
    for rows, parent in zip(own, segments.parents.tolist(), strict=True):
        before = paths[parent] if parent >= 0 else [x[:0] for x in rows]
        paths.append([torch.cat(pair) for pair in zip(before, rows, strict=True)])
        num_rows = len(rows[0])
        if num_rows:
            out, _ = rule([x[None] for x in paths[-1]], None)
            outs.append(out[0, -num_rows:])
    return torch.cat(outs)
