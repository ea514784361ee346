"""Matrix products whose sums and results are float32 (float64 for float64), whatever goes in.

A GPU multiplies half-precision operands exactly and adds in float32; a CPU would round the product
of two, so there they are cast first. `padded` makes the bits of a row independent of the others.
"""

import torch
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype

HALF = (torch.bfloat16, torch.float16)
FEW_ROWS = range(2, 9)  # a CPU multiplies so few from the other side, at the speed of memory
TILE = 16  # a padded product runs on multiples of this many rows and columns


def round_up(size: int) -> int:
    """The next multiple of TILE."""
    return -(-size // TILE) * TILE


def product(left: Tensor, right: Tensor, *, padded: bool = False) -> Tensor:
    """left @ right in the accumulation dtype."""
    if _in_half(left, right):
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    dtype = accumulation_dtype(left.dtype)
    if padded and not left.is_cuda:
        return (_padded(left) @ _padded(right))[: left.shape[0], : right.shape[1]]
    return left.to(dtype) @ right.to(dtype)


def write_product(out: Tensor, left: Tensor, right: Tensor, *, padded: bool = False) -> None:
    """out = left @ right, for `out` in any dtype; no temporary where it is in that of the sums."""
    dtype = accumulation_dtype(left.dtype)
    if padded or out.dtype != dtype:
        out.copy_(product(left, right, padded=padded))
    elif _in_half(left, right):
        torch.mm(left.to(right.dtype), right, out_dtype=torch.float32, out=out)
    elif not left.is_cuda and left.shape[0] in FEW_ROWS and right.mT.is_contiguous():
        out.copy_(torch.mm(right.mT.to(dtype), left.mT.to(dtype)).mT)
    else:
        torch.mm(left.to(dtype), right.to(dtype), out=out)


def add_product(
    total: Tensor, left: Tensor, right: Tensor, *, scale: float = 1.0, padded: bool = False
) -> None:
    """total += scale * left @ right, in place."""
    dtype = accumulation_dtype(left.dtype)
    if padded or total.dtype != dtype:
        total.add_(product(left, right, padded=padded), alpha=scale)
    elif _in_half(left, right):
        left = left.to(right.dtype)
        torch.addmm(total, left, right, out_dtype=torch.float32, alpha=scale, out=total)
    else:
        total.addmm_(left.to(dtype), right.to(dtype), alpha=scale)


def _in_half(left: Tensor, right: Tensor) -> bool:
    """Whether a GPU multiplies in half precision, for which it rounds a float32 left.

    Gradients of logits are often below the range of float16, so they stay as they are there.
    """
    is_narrow = right.dtype == torch.float16 and left.dtype != torch.float16
    return left.is_cuda and right.dtype in HALF and not is_narrow


def _padded(matrix: Tensor) -> Tensor:
    """The matrix in the accumulation dtype, with zeros up to multiples of TILE in both directions.

    A CPU's product rounds a row by its place among tails and unaligned rows; now there are none.
    """
    dtype = accumulation_dtype(matrix.dtype)
    shape = [round_up(size) for size in matrix.shape]
    is_dense = matrix.is_contiguous() or matrix.T.is_contiguous()
    if matrix.dtype == dtype and list(matrix.shape) == shape and is_dense:
        return matrix
    padded = matrix.new_zeros(shape, dtype=dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded
