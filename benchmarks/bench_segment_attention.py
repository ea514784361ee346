"""Attention of a group whose prompt is there once, against repeated rows and other ways.

python benchmarks/bench_segment_attention.py [--quick] [--json PATH] [--csv PATH]
    [--device cpu|cuda] [--only TEXT ...] [--against PEER ...]

PrefixGrouper takes part where its package is installed, flash attention and FlexAttention on CUDA.
"""

from __future__ import annotations

import sys

import torch
from attention_cases import AttentionCase, Group, attention_loaders, prepare
from compare import main
from inputs import SPREAD


def make_cases(quick: bool, device: str) -> list[AttentionCase]:
    """Both operations at every size, then with log-normal lengths."""
    return [
        AttentionCase(operation, group)
        for group in groups(quick, device)
        for operation in ("attention", "attention_forward")
    ]


def groups(quick: bool, device: str) -> list[Group]:
    """Heads of a small model on a CPU, of Qwen3-1.7B on a GPU."""
    if quick:
        sizes = [(48, 16, 4)]
        heads, dtype = (4, 2, 32), torch.float32
    elif device == "cuda":
        sizes = [(512, 512, 8), (2048, 512, 16), (4096, 256, 16), (8192, 1024, 8)]
        heads, dtype = (16, 8, 128), torch.bfloat16
    else:
        sizes = [(1024, 64, 16), (512, 128, 8), (256, 64, 8)]
        heads, dtype = (8, 4, 64), torch.float32
    equal = [Group(*size, *heads, dtype, device) for size in sizes]
    return [*equal, *(Group(*size, *heads, dtype, device, SPREAD) for size in sizes[:2])]


if __name__ == "__main__":
    loaders = attention_loaders(groups(quick=True, device="cpu")[0])
    sys.exit(main(__doc__.splitlines()[0], make_cases, prepare, loaders))
