"""Drop-in parts for reinforcement learning of language models; needs torch and nothing else."""

from fastrl_kernels.head import LMHead
from fastrl_kernels.linear_logps import LinearLogps, linear_logps
from fastrl_kernels.segment_attention import segment_attention
from fastrl_kernels.segments import Segments, make_segments

__all__ = [
    "LMHead",
    "LinearLogps",
    "Segments",
    "linear_logps",
    "make_segments",
    "segment_attention",
]
