"""Run by test_objectives_in_triton.py as a process of its own: the interpreter is chosen at import.

`interpret` compares every objective inside a kernel with the torch binding of the same source;
`compile ARCH` builds machine code of each for one architecture.
"""

import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrl_kernels.objectives import REGULARISERS, SURROGATES, bind_torch

CLIPS = ("clipped_ratio", "truncated_importance")
BLOCK = 128


@triton.jit
def with_bounds(
    x_ptr, y_ptr, a_ptr, value_ptr, slope_ptr, n, low, high, FUNCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    m = i < n
    x, y, a = tl.load(x_ptr + i, m), tl.load(y_ptr + i, m), tl.load(a_ptr + i, m)
    value, slope = FUNCTION(x, y, a, low, high)
    tl.store(value_ptr + i, value, m)
    tl.store(slope_ptr + i, slope, m)


@triton.jit
def with_advantage(
    x_ptr, y_ptr, a_ptr, value_ptr, slope_ptr, n, low, high, FUNCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    m = i < n
    x, y, a = tl.load(x_ptr + i, m), tl.load(y_ptr + i, m), tl.load(a_ptr + i, m)
    value, slope = FUNCTION(x, y, a)
    tl.store(value_ptr + i, value, m)
    tl.store(slope_ptr + i, slope, m)


@triton.jit
def with_reference(
    x_ptr, y_ptr, a_ptr, value_ptr, slope_ptr, n, low, high, FUNCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    m = i < n
    value, slope = FUNCTION(tl.load(x_ptr + i, m), tl.load(y_ptr + i, m))
    tl.store(value_ptr + i, value, m)
    tl.store(slope_ptr + i, slope, m)


def cases():
    """(name, kernel, objective, arguments of the torch binding given (x, y, a))."""
    for name, function in SURROGATES.items():
        if name in CLIPS:
            yield name, with_bounds, function, lambda x, y, a: (x, y, a, 0.2, 0.28)
        else:
            yield name, with_advantage, function, lambda x, y, a: (x, y, a)
    for name, function in REGULARISERS.items():
        yield name, with_reference, function, lambda x, y, a: (x, y)


def interpret() -> None:
    """Values and slopes of the interpreted kernel against those of torch."""
    generator = torch.Generator().manual_seed(0)
    x, y, a = (torch.randn(123, generator=generator) for _ in range(3))
    x[:3] = y[:3] + torch.tensor([25.0, -25.0, 0.0])
    for name, kernel, function, arguments in cases():
        got = torch.full((2, 123), torch.nan)
        kernel[(1,)](x, y, a, got[0], got[1], 123, 0.2, 0.28, triton.jit(function), BLOCK)
        want = torch.stack(bind_torch(function)(*arguments(x, y, a)))
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6, msg=name)
        print("same", name)


def compile_for(arch: int) -> None:
    """Machine code for one architecture, without a GPU."""
    pointers = dict.fromkeys(("x_ptr", "y_ptr", "a_ptr", "value_ptr", "slope_ptr"), "*fp32")
    types = {**pointers, "n": "i32", "low": "fp32", "high": "fp32"}
    for name, kernel, function, _ in cases():
        source = ASTSource(
            fn=kernel,
            signature={**types, "FUNCTION": "constexpr", "BLOCK": "constexpr"},
            constexprs={(8,): triton.jit(function), (9,): BLOCK},
        )
        assert triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]
        print("compiled", name)


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[2]))
