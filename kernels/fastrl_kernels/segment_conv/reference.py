"""A causal convolution over a forest of segments, the obvious way: every path in full.

N packed tokens, D channels, T tokens of a path.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl_kernels.segments import Segments


def segment_conv_reference(
    x: Tensor, conv: Callable[[Tensor], Tensor], segments: Segments, *, kernel_size: int
) -> Tensor:
    """`segment_conv` from one convolution a segment, over its whole path."""
    own = x.split(segments.lengths.tolist())
    paths: list[Tensor] = []
    outs = []
    for rows, parent in zip(own, segments.parents.tolist(), strict=True):
        paths.append(rows if parent < 0 else torch.cat([paths[parent], rows]))
        if len(rows):
            outs.append(conv(paths[-1])[-len(rows) :])
    return torch.cat(outs)
