"""One step of AdamW, in place, in float32 arithmetic, whatever weights and moments are kept in."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl_kernels.adamw.blockwise import BLOCK_SIZE, num_blocks
from fastrl_kernels.adamw.reference import ZERO_KEYS, Keys, Moments, Rates, adamw_step_reference
from fastrl_kernels.adamw.weights import SplitWeights, join, split
from fastrl_kernels.implementation import choose_implementation

__all__ = ["Keys", "Moments", "Rates", "SplitWeights", "adamw_step", "join", "split"]


def adamw_step(
    weights: Tensor, gradients: Tensor, moments: Moments, rates: Rates, *, scale: float = 1.0,
    remainders: Tensor | None = None, start: int = 0, keys: Keys = ZERO_KEYS,
    implementation: str = "auto",
) -> None:  # fmt: skip
    """Step `weights` by `gradients` times `scale`, and `moments`, in place.

    weights: (n,) contiguous, float32; or bfloat16, with `remainders` (n,) int16 exactly a float32
    (see `split`), without them rounded by chance to one of the two neighbours, unbiased.
    gradients: (n,) float32 or bfloat16.
    moments: float32, or 8-bit codes with scales (see `blockwise`), rounded by chance too.
    start: where in its parameter the first element is, a multiple of 256: with the keys it decides
    the chances, so that a parameter may be stepped in pieces.

    In torch, float32 has the bits of torch.optim.AdamW; in Triton one kernel moves each byte once,
    and results differ from torch's by float32 rounding. Each gives the same bits on every run.
    """
    found = choose_implementation(implementation, weights)
    _check(weights, gradients, moments, remainders, start)
    step = adamw_step_reference
    if found == "triton":
        from fastrl_kernels.adamw.kernel import adamw_step_triton as step
    step(
        weights, gradients, moments, rates,
        scale=scale, remainders=remainders, start=start, keys=keys,
    )  # fmt: skip


def _check(
    weights: Tensor, gradients: Tensor, moments: Moments, remainders: Tensor | None, start: int
) -> None:
    """Shapes and dtypes, which a kernel would read wrongly."""
    count = weights.numel()
    is_coded = moments.first_scales is not None
    expected = {
        "weights": (weights, (torch.bfloat16, torch.float32), count),
        "gradients": (gradients, (torch.bfloat16, torch.float32), count),
        "remainders": (remainders, (torch.int16,), count),
        "first": (moments.first, (torch.int8 if is_coded else torch.float32,), count),
        "second": (moments.second, (torch.uint8 if is_coded else torch.float32,), count),
        "first_scales": (moments.first_scales, (torch.float32,), num_blocks(count)),
        "second_scales": (moments.second_scales, (torch.float32,), num_blocks(count)),
    }
    for name, (tensor, dtypes, length) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != (length,) or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, of shape ({length},) and "
                f"{' or '.join(map(str, dtypes))}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    if (moments.first_scales is None) != (moments.second_scales is None):
        raise ValueError("both moments must have scales or neither; they are coded alike")
    if remainders is not None and weights.dtype != torch.bfloat16:
        raise ValueError(f"remainders are of bfloat16 weights, got {weights.dtype}; leave them out")
    if start % BLOCK_SIZE:
        raise ValueError(f"start must be a multiple of {BLOCK_SIZE}, got {start}")
