"""What the kernels take on a GPU beside inputs and outputs, from shapes alone.

N packed tokens, H query heads, Hkv key heads, K head size of queries and keys, Kv of values.
"""

import torch

from fastrl_kernels.implementation import interprets_triton
from fastrl_kernels.segment_attention.launch import (
    INTERPRETED_UNITS,
    UNITS_PER_PROCESSOR,
    tilings,
)
from fastrl_kernels.segment_attention.tiles import Sizes, make_tiles
from fastrl_kernels.segments import Segments

NUM_PROCESSORS = 132
"""Of an H100 or H200; the gradients of keys are shared out among a few programs for each."""


def bytes_inside(
    segments: Segments, *, num_heads: int, num_kv_heads: int, head_size: int, value_size: int,
    dtype: torch.dtype, window: int | None, num_processors: int = NUM_PROCESSORS,
) -> int:  # fmt: skip
    """Of `launch.backward`: outputs times their gradients, and the sums of shared keys.

    `launch.forward` takes nothing.
    """
    tiling = tilings(dtype, max(head_size, value_size), torch.device("cuda"))
    num_programs = UNITS_PER_PROCESSOR * num_processors
    sizes = Sizes(
        window=window, num_groups=num_heads // num_kv_heads, num_kv_heads=num_kv_heads,
        query_tile=tiling.forward.queries, key_tile=tiling.key_gradients.keys,
        query_step=tiling.key_gradients.queries,
        num_programs=INTERPRETED_UNITS if interprets_triton() else num_programs,
    )  # fmt: skip
    num_slots = make_tiles(segments, sizes).num_slots
    sums = num_slots * num_kv_heads * sizes.key_tile * (head_size + value_size)
    return 4 * (num_heads * segments.num_tokens + sums)
