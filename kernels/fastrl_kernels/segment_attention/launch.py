"""`segment_attention` on a GPU: what the kernels are launched with, forward and backward.

N packed tokens, H query heads, Hkv key heads, K head size of queries and keys, Kv of values.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.implementation import interprets_triton
from fastrl_kernels.launch import cdiv, column_of, power_of_2, upcast
from fastrl_kernels.products import HALF
from fastrl_kernels.segment_attention.backward_kernel import (
    deltas_kernel,
    key_gradients_kernel,
    query_gradients_kernel,
    sum_units_kernel,
)
from fastrl_kernels.segment_attention.kernel import forward_kernel
from fastrl_kernels.segment_attention.tiles import Sizes, Tiles, tiles_of
from fastrl_kernels.segments import Segments

UNITS_PER_PROCESSOR = 6  # enough to even out their work; each may leave a tile of sums to add up
INTERPRETED_UNITS = 24
LARGEST_STRIDE = 2**23  # elements between tokens


class Options(NamedTuple):
    """What turns products into scores, and which scores count."""

    scale: float
    window: int | None
    softcap: float | None


class Tile(NamedTuple):
    """Shape of a kernel's tile of scores and how many threads work on it."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """Of a thread, where the assembler would take fewer and spill; None: its own choice."""

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.queries, "BLOCK_N": self.keys}

    @property
    def threads(self) -> dict[str, int]:
        """The launch's own keywords."""
        threads = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return threads if self.max_registers is None else {**threads, "maxnreg": self.max_registers}


class Tilings(NamedTuple):
    """Tiles of the three kernels; the first two share tiles of queries."""

    forward: Tile
    query_gradients: Tile
    key_gradients: Tile


# By the column of the GPU and the larger head size: the largest tiles without spills in a loop, by
# benchmarks/kernel_resources.py; not yet tuned on a device.
HALF_TILINGS = {
    "large": {
        64: Tilings(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
        128: Tilings(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3)),
        256: Tilings(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 8, 1)),
    },
    "small": {
        64: Tilings(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 64, 8, 2)),
        128: Tilings(Tile(64, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
        256: Tilings(Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)),
    },
}
WIDE_TILINGS = {
    64: Tilings(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(16, 32, 8, 1)),
    128: Tilings(Tile(32, 32, 8, 1), Tile(32, 16, 8, 1, 128), Tile(16, 32, 8, 1)),
    256: Tilings(Tile(16, 16, 8, 1, 128), Tile(16, 16, 8, 1, 128), Tile(16, 16, 8, 1)),
}
INTERPRETED_TILING = Tilings(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))


def tilings(dtype: torch.dtype, head_size: int, device: torch.device) -> Tilings:
    """Tiles of the kernels; fixed for a model and a GPU, so that bits do not depend on the row."""
    table = HALF_TILINGS[column_of(device)] if dtype in HALF else WIDE_TILINGS
    if head_size > max(table):
        raise ValueError(
            f"the kernels take heads of at most {max(table)} in {dtype}, got {head_size}; "
            'use implementation="torch"'
        )
    return INTERPRETED_TILING if interprets_triton() else table[max(64, power_of_2(head_size))]


def attention_tiles(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None
) -> Tiles:
    """The tables for `forward` and `backward`, made at the first call for these segments."""
    tiling = tilings(q.dtype, max(q.shape[2], v.shape[2]), q.device)
    num_programs = INTERPRETED_UNITS
    if q.is_cuda:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        num_programs = UNITS_PER_PROCESSOR * processors
    sizes = Sizes(
        window=window, num_groups=q.shape[1] // k.shape[1], num_kv_heads=k.shape[1],
        query_tile=tiling.forward.queries, key_tile=tiling.key_gradients.keys,
        query_step=tiling.key_gradients.queries, num_programs=num_programs,
    )  # fmt: skip
    return tiles_of(segments, sizes)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, tiles: Tiles, options: Options
) -> tuple[Tensor, Tensor]:
    """Output (N, H, Kv) in the dtype of q, and natural log-sum-exp (H, N) float32, sinks included.

    q: (N, H, K), k: (N, Hkv, K), v: (N, Hkv, Kv) of one dtype, any strides. sinks: (H,).
    """
    q, k, v = (_dense(x) for x in (q, k, v))
    num_tokens, num_heads, _ = q.shape
    out = q.new_empty(num_tokens, num_heads, v.shape[2])
    lse = q.new_empty(num_heads, num_tokens, dtype=torch.float32)
    tiling = tilings(q.dtype, max(q.shape[2], v.shape[2]), q.device).forward
    forward_kernel[(tiles.query_tiles.shape[0] * num_heads,)](
        q, k, v, sinks, tiles.paths, tiles.query_tiles, out, lse, num_tokens, num_heads,
        num_heads // k.shape[1], *_strides(q, k, v), out.stride(0), *_numbers(options),
        HAS_SINKS=sinks is not None, **_constants(q, v, options), **tiling.blocks, **tiling.threads,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor,
    tiles: Tiles, options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and sinks, each in its dtype, from that of the output (N, H, Kv).

    out and lse are those of `forward`. The same bits on every run.
    """
    q, k, v, grad = (_dense(x) for x in (q, k, v, grad))
    deltas = _deltas(out, grad)
    dq = _query_gradients(grad, q, k, v, lse, deltas, tiles, options)
    dk, dv = _key_gradients(grad, q, k, v, lse, deltas, tiles, options)
    if sinks is None:
        return dq, dk, dv, None
    probs = torch.exp(sinks.float()[:, None] - lse)  # (H, N)
    return dq, dk, dv, -(probs * deltas).sum(1).to(sinks.dtype)


def _deltas(out: Tensor, grad: Tensor) -> Tensor:
    """(H, N) float32: each output times its gradient."""
    num_tokens, num_heads, value_size = out.shape
    deltas = out.new_empty(num_heads, num_tokens, dtype=torch.float32)
    block = 4
    deltas_kernel[(cdiv(num_tokens, block) * num_heads,)](
        out, grad, deltas, num_tokens, num_heads, out.stride(0), *_strides(grad),
        VALUE_SIZE=value_size, BLOCK_V=_block(value_size), BLOCK_M=block,
    )  # fmt: skip
    return deltas


def _query_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, deltas: Tensor, tiles: Tiles,
    options: Options,
) -> Tensor:  # fmt: skip
    num_tokens, num_heads, head_size = q.shape
    dq = q.new_empty(q.shape)
    tiling = tilings(q.dtype, max(head_size, v.shape[2]), q.device).query_gradients
    query_gradients_kernel[(tiles.query_tiles.shape[0] * num_heads,)](
        q, k, v, grad, lse, deltas, tiles.paths, tiles.query_tiles, dq, num_tokens, num_heads,
        num_heads // k.shape[1], *_strides(q, k, v, grad), dq.stride(0), *_numbers(options),
        **_constants(q, v, options), **tiling.blocks, **tiling.threads,
    )  # fmt: skip
    return dq


def _key_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, deltas: Tensor, tiles: Tiles,
    options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_kv_heads, num_groups = k.shape[1], q.shape[1] // k.shape[1]
    tiling = tilings(q.dtype, max(q.shape[2], v.shape[2]), q.device).key_gradients
    gradients = dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    sums = [
        x.new_empty(tiles.num_slots, num_kv_heads, tiling.keys, x.shape[2], dtype=torch.float32)
        for x in gradients
    ]
    key_gradients_kernel[(tiles.key_units.shape[0] * num_kv_heads,)](
        q, k, v, grad, lse, deltas, tiles.positions, tiles.key_units, dk, dv, *sums, q.shape[0],
        num_kv_heads, num_groups, *_strides(q, k, v, grad), dk.stride(0), dv.stride(0),
        *_numbers(options), **_constants(q, v, options), **tiling.blocks, **tiling.threads,
    )  # fmt: skip
    if tiles.num_slots:
        for total, parts in zip(gradients, sums, strict=True):
            size = total.shape[2]
            sum_units_kernel[(tiles.key_splits.shape[0] * num_kv_heads,)](
                parts, tiles.key_splits, total, num_kv_heads, total.stride(0), SIZE=size,
                BLOCK=_block(size), BLOCK_N=tiling.keys,
            )  # fmt: skip
    return dk, dv


def _dense(tensor: Tensor) -> Tensor:
    """The same values, copied unless the kernels can read them.

    They want the elements of each head side by side, and offsets inside a tile below 2^31.
    """
    is_readable = tensor.stride(-1) == 1 and tensor.stride(0) < LARGEST_STRIDE
    return tensor if is_readable else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of tokens and of heads."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _numbers(options: Options) -> tuple[float, float, int]:
    return float(options.scale), float(options.softcap or 1.0), options.window or 0


def _block(size: int) -> int:
    """Columns that cover a head; products need at least 16."""
    return max(16, power_of_2(size))


def _constants(q: Tensor, v: Tensor, options: Options) -> dict[str, Any]:
    return {
        "HAS_SOFTCAP": options.softcap is not None,
        "HAS_WINDOW": options.window is not None,
        "HEAD_SIZE": q.shape[2],
        "VALUE_SIZE": v.shape[2],
        "BLOCK_K": _block(q.shape[2]),
        "BLOCK_V": _block(v.shape[2]),
        **upcast(),
    }
