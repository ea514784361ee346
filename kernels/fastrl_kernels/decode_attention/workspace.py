"""Memory of `decode_attention` beside what goes in and comes out, from shapes alone.

R rows, P groups, W rows of the largest, H heads, Hkv key-value heads, K head size of queries and
keys, Kv of values, L prefix columns, C suffix columns.
"""

import torch
from torch import Tensor

from fastrl_kernels.decode_attention.grouped import COPIED_BYTES
from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.products import HALF

PART_COLUMNS = 256  # `launch.SPLIT`, which cannot be read where triton is missing
SCALARS = 3  # of a row's head: the largest score, that of its prefix, the sum


def workspace_bytes(
    q: Tensor,
    prefix_k: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    *,
    suffix_length: int,
    window: int | None,
    implementation: str,
) -> int:
    """Most bytes of an implementation, "torch" or "triton", for groups of about as many rows.

    Shapes as in `decode_attention`. Prefixes are taken to be about as long as their columns.
    """
    num_rows, num_heads, head_size = q.shape
    value_size = suffix_v.shape[3]
    if implementation == "triton":
        num_parts = -(-prefix_k.shape[2] // PART_COLUMNS) - (-suffix_length // PART_COLUMNS)
        return num_parts * num_rows * num_heads * (value_size + 2) * torch.float32.itemsize
    reach = prefix_k.shape[2]
    own = suffix_length
    if window is not None:
        own, reach = min(own, window), min(reach, max(0, window - suffix_length))
    num_groups, num_kv_heads = prefix_k.shape[:2]
    width = -(-num_rows // num_groups)
    step, copied = num_groups, 0
    if q.dtype in HALF:
        num_columns = prefix_k.shape[2] + width * suffix_length
        size = 4 * num_kv_heads * (head_size + value_size) * num_columns
        step = min(num_groups, max(1, COPIED_BYTES // size))
        # Keys and values of the rows until the end, one of the two of the prefixes at a time.
        sizes = width * own * (head_size + value_size) + reach * max(head_size, value_size)
        copied = step * num_kv_heads * sizes
    rows_at_once = min(num_rows, step * width)
    has_copy = num_kv_heads > 1 or q.dtype in HALF  # of queries, in the order of heads
    values = has_copy * head_size + own + value_size + SCALARS
    if reach:  # what the prefixes add, and that in the order of rows
        values += reach + value_size * (2 if width > 1 and num_kv_heads > 1 else 1)
    itemsize = accumulation_dtype(q.dtype).itemsize
    return (rows_at_once * num_heads * values + copied) * itemsize
