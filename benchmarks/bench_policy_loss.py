"""The policy loss and the log-probabilities of a language-model head against their peers.

python benchmarks/bench_policy_loss.py [--quick] [--json PATH] [--csv PATH] [--device cpu|cuda]
    [--only TEXT ...] [--against PEER ...]

TRL, Liger and Cut Cross-Entropy take part where they are installed.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from cases import Case, prepare
from compare import main
from implementations import logps_loaders, policy_loaders
from inputs import SPREAD, Shape


def make_cases(quick: bool, device: str) -> list[Case]:
    """Every operation at every size, the most telling first; then sequences of log-normal lengths,
    which matter to those that know one advantage a sequence.
    """
    equal = [
        Case(operation, shape, share_trained)
        for shape in shapes(quick, device)
        for operation, share_trained in (
            ("policy_loss", 1.0),
            ("policy_loss", 0.2),
            ("linear_logps", 1.0),
            ("forward", 1.0),
            ("policy_loss", 0.5),
        )
    ]
    uneven = dataclasses.replace(shapes(quick, device)[0], spread=SPREAD)
    return [*equal, Case("policy_loss", uneven)]


def shapes(quick: bool, device: str) -> list[Shape]:
    """Sizes of a small model's update on a CPU; of Qwen3-1.7B's on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if quick:
        return [Shape(256, 8192, 64, dtype, device)]
    if device == "cuda":
        return [Shape(8192, 151936, 2048, dtype, device)]
    return [Shape(2048, 65536, 256, dtype, device), Shape(2048, 32768, 512, dtype, device)]


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], make_cases, prepare, policy_loaders() | logps_loaders()))
