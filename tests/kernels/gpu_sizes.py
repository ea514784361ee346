"""Sizes and devices of the tests that want a GPU, and of their rehearsal in Triton's interpreter.

TRITON_INTERPRET=1 pytest -m gpu FILE runs a rehearsal: the same code at tiny sizes on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

Size = TypeVar("Size")
ON_GPU = torch.cuda.is_available()
IS_REHEARSAL = not ON_GPU and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_GPU or IS_REHEARSAL), reason="needs an NVIDIA GPU"),
]
NUM_RUNS = 20 if ON_GPU else 2


def sized(on_gpu: Size, in_rehearsal: Size) -> Size:
    """The size of the place."""
    return on_gpu if ON_GPU else in_rehearsal


def make_generator(seed: int = 0) -> torch.Generator:
    """On the device of the tests."""
    return torch.Generator(DEVICE).manual_seed(seed)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; NaN is in no range."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def assert_same_on_every_run(run: Callable[[], list[Tensor]]) -> None:
    """The same bits, NUM_RUNS times."""
    first = run()
    for _ in range(NUM_RUNS - 1):
        for value, expected in zip(run(), first, strict=True):
            assert torch.equal(value, expected)
