"""A step of AdamW over one flat piece, by the kernel alone: where tune.py times its launches.

n elements: bfloat16 weights with remainders, bfloat16 gradients, moments in float32 or 8 bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cases import Prepared
from reference import Errors
from torch import Tensor

from fastrl_kernels.adamw import Moments, Rates, adamw_step, split
from fastrl_kernels.adamw.blockwise import num_blocks

KERNEL = "fastrl adamw_step"
RATES = Rates(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)


@dataclass(frozen=True)
class Elements:
    """What a case is large in."""

    count: int
    device: str
    dtype: torch.dtype = torch.float32
    """In which results are judged."""


@dataclass(frozen=True)
class AdamWCase:
    """One way to keep moments, at one size."""

    in_8bit: bool
    shape: Elements

    def __str__(self) -> str:
        """Name of the case in the results."""
        return f"adamw {'8 bits' if self.in_8bit else 'float32'} n={self.shape.count}"


class State(NamedTuple):
    """(n,) each, but for scales."""

    weights: Tensor
    gradients: Tensor
    remainders: Tensor
    moments: Moments

    def step(self, implementation: str) -> None:
        """In place."""
        adamw_step(
            self.weights, self.gradients, self.moments, RATES, remainders=self.remainders,
            implementation=implementation,
        )  # fmt: skip

    def some(self, count: int) -> State:
        """A copy of the first elements, a multiple of a block."""
        moments = Moments._make(
            None if x is None else x[: num_blocks(count) if "scales" in name else count].clone()
            for name, x in self.moments._asdict().items()
        )
        return State(*(x[:count].clone() for x in self[:3]), moments)


def prepare(case: AdamWCase, only: str | None = None) -> Prepared:
    """The kernel, and its check on a piece against the same step in PyTorch."""
    assert only in (None, KERNEL)
    state = make_state(case)
    tensors = [x for x in (*state[:3], *state.moments) if x is not None]
    target = torch.empty_like(state.moments.first)
    return Prepared(
        steps={KERNEL: functools.partial(state.step, "triton")},
        leaves=(state.weights,),
        check=lambda _: compare(state),
        make_floor=lambda: functools.partial(target.copy_, state.moments.first),
        floor_name="a copy of a moment",
        num_bytes=2 * sum(x.nbytes for x in tensors) - state.gradients.nbytes,
        formulas="bytes = all of the state read and written, gradients read",
    )


def make_state(case: AdamWCase, *, seed: int = 0) -> State:
    """As after some steps."""
    count, device = case.shape.count, case.shape.device
    random = torch.Generator(device).manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(count, generator=random, device=device)

    weights, remainders = split(normal(0.02))
    moments = Moments(normal(1e-3), normal(1e-3).square())
    if case.in_8bit:
        moments = coded(moments)
    return State(weights, normal(1e-2).bfloat16(), remainders, moments)


def coded(moments: Moments) -> Moments:
    """In 8 bits, without chance."""
    from fastrl_kernels.adamw.blockwise import encode_first, encode_second

    chances = torch.full_like(moments.first, 0.5)
    first, first_scales = encode_first(moments.first, chances)
    second, second_scales = encode_second(moments.second, chances)
    return Moments(first, second, first_scales, second_scales)


def compare(state: State, count: int = 2**16) -> Errors:
    """The weights of a piece after one more step, against PyTorch's; float32 rounding differs."""
    from fastrl_kernels.adamw import join

    ours, theirs = (state.some(min(count, len(state.weights))) for _ in range(2))
    before = join(ours.weights, ours.remainders).double()
    ours.step("triton")
    theirs.step("torch")
    found: Any
    found, truth = (join(x.weights, x.remainders).double() - before for x in (ours, theirs))
    return Errors(hidden_grad=float((found - truth).norm() / truth.norm()))
