"""Log-probabilities and entropies of logits that the caller already holds, against their peers.

python benchmarks/bench_selected_logps.py [--quick] [--json PATH] [--csv PATH] [--device cpu|cuda]
    [--only TEXT ...] [--against PEER ...]

TRL and Liger take part where they are installed.
"""

from __future__ import annotations

import sys

import torch
from cases import Case
from compare import main
from inputs import Shape
from logits_cases import forward_loaders, prepare, selected_loaders


def make_cases(quick: bool, device: str) -> list[Case]:
    """Both operations; the hidden size plays no part."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = Shape(2048, 65536, 0, dtype, device)
    if quick:
        shape = Shape(256, 8192, 0, dtype, device)
    elif device == "cuda":
        shape = Shape(8192, 151936, 0, dtype, device)
    return [Case("selected_logps", shape), Case("selected_forward", shape)]


if __name__ == "__main__":
    loaders = selected_loaders() | forward_loaders()
    sys.exit(main(__doc__.splitlines()[0], make_cases, prepare, loaders))
