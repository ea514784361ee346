"""`segment_attention` as a Triton kernel: outputs of a tile of queries from all of its path.

A program owns the queries of one tile and one head. It goes down the path from the root, through
the key tiles of each segment in order, with a running softmax in powers of 2. Only the last tiles
of a segment need a mask: where keys end, or where they pass the queries.
N packed tokens, H query heads, K head size of queries and keys, Kv of values.
"""

import triton
import triton.language as tl

from fastrl_kernels.running_softmax import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    ptr, first, count, stride, IS_WHOLE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of a tensor from `first`, an int64, on, (ROWS, BLOCK); zero past `count` and SIZE.

    IS_WHOLE: there are enough. One wide base and narrow offsets: wide ones would spill.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    ptrs = ptr + first * stride + (row[:, None] * stride + column[None, :])
    if not IS_WHOLE:
        values = tl.load(ptrs, (row < count)[:, None] & (column < SIZE)[None, :], 0.0)
    elif SIZE < BLOCK:
        values = tl.load(ptrs, (column < SIZE)[None, :], 0.0)
    else:
        values = tl.load(ptrs)
    return values


@triton.jit
def store_rows(
    ptr, first, count, stride, values, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write `count` rows, SIZE columns of each, in the dtype of the pointer."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    ptrs = ptr + first * stride + (row[:, None] * stride + column[None, :])
    tl.store(ptrs, values, (row < count)[:, None] & (column < SIZE)[None, :])


@triton.jit
def product(left, right, total, UPCAST: tl.constexpr):
    """total + left @ right, (rows, columns) float32."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def scores_of(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of log 2, and their derivative over that of the scaled products."""
    scores = products * scale
    slope = 1.0
    if HAS_SOFTCAP:
        capped = tanh(scores / softcap)
        scores = softcap * capped
        slope = 1.0 - capped * capped
    return scores * LOG2E, slope


@triton.jit
def add_keys(
    accumulated, m, s, q, k_ptr, v_ptr, first, count, k_stride, v_stride, visible, scale, softcap,
    IS_WHOLE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The running softmax after one more tile of keys: weighted values, largest score, sum.

    first, count: the keys' tokens. visible: (BLOCK_M, BLOCK_N), unless IS_WHOLE.
    """
    k = load_rows(k_ptr, first, count, k_stride, IS_WHOLE, BLOCK_N, HEAD_SIZE, BLOCK_K)
    zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    scores, _ = scores_of(product(q, tl.trans(k), zeros, UPCAST), scale, softcap, HAS_SOFTCAP)
    if not IS_WHOLE:
        scores = tl.where(visible, scores, -float("inf"))
    new_m = tl.maximum(m, tl.max(scores, 1))
    # A window hides whole tiles from some rows: any finite number keeps exp2(-inf - it) at 0.
    shift = tl.where(new_m == -float("inf"), 0.0, new_m)
    factor = tl.exp2(m - shift)
    p = tl.exp2(scores - shift[:, None])
    v = load_rows(v_ptr, first, count, v_stride, IS_WHOLE, BLOCK_N, VALUE_SIZE, BLOCK_V)
    accumulated = product(p.to(v.dtype), v, accumulated * factor[:, None], UPCAST)
    return accumulated, new_m, s * factor + tl.sum(p, 1)


@triton.jit
def path_entry(
    paths_ptr, entry, last_entry, offset, window, HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys that one segment of a path has for a tile of queries, offset into the last segment.

    Returns its first token and length; index of the first key that needs a mask, and of the end;
    and for each query the first and last key that it sees. Keys before the first that needs a mask
    are seen by all queries, or with a window by none.
    """
    first_key = tl.load(paths_ptr + 3 * entry).to(tl.int64)
    length = tl.load(paths_ptr + 3 * entry + 1)
    is_own = entry == last_entry
    query = offset + tl.arange(0, BLOCK_M)
    end = tl.where(is_own, tl.minimum(length, offset + BLOCK_M), length)
    masked = tl.where(is_own, offset, length) // BLOCK_N * BLOCK_N
    first_seen = tl.zeros([BLOCK_M], tl.int32)
    if HAS_WINDOW:
        distance = tl.load(paths_ptr + 3 * last_entry + 2) - tl.load(paths_ptr + 3 * entry + 2)
        first_seen = distance + query - window + 1
        masked = tl.maximum(distance + offset - window + 1, 0) // BLOCK_N * BLOCK_N
    last_seen = tl.where(is_own, query, length - 1)
    return first_key, length, masked, end, first_seen, last_seen


@triton.jit(do_not_specialize=["num_tokens", "window"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, paths_ptr, query_tiles_ptr, out_ptr, lse_ptr, num_tokens,
    num_heads, num_groups, q_stride, q_head_stride, k_stride, k_head_stride, v_stride,
    v_head_stride, out_stride, scale, softcap, window,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (N, H, Kv) and its natural log-sum-exp (H, N) float32 of one tile and one head."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    tile_ptr = query_tiles_ptr + 4 * (tl.program_id(0) // num_heads)
    first, offset = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1)
    last_entry = tl.load(tile_ptr + 3) - 1
    count = tl.load(paths_ptr + 3 * last_entry + 1) - offset
    q_ptr += head * q_head_stride
    kv_head = (tl.program_id(0) % num_heads // num_groups).to(tl.int64)
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    q = load_rows(q_ptr, first, count, q_stride, False, BLOCK_M, HEAD_SIZE, BLOCK_K)

    accumulated = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    s = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        s += 1.0
    for entry in range(tl.load(tile_ptr + 2), last_entry + 1):
        first_key, length, masked, end, first_seen, last_seen = path_entry(
            paths_ptr, entry, last_entry, offset, window, HAS_WINDOW, BLOCK_M, BLOCK_N
        )
        for start in range(0, 0 if HAS_WINDOW else masked, BLOCK_N):
            accumulated, m, s = add_keys(
                accumulated, m, s, q, k_ptr, v_ptr, first_key + start, length - start, k_stride,
                v_stride, True, scale, softcap, True, HAS_SOFTCAP, HEAD_SIZE, VALUE_SIZE,
                BLOCK_K, BLOCK_V, BLOCK_N, UPCAST,
            )  # fmt: skip
        for start in range(masked, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            visible = key[None, :] <= last_seen[:, None]
            if HAS_WINDOW:
                visible = visible & (key[None, :] >= first_seen[:, None])
            accumulated, m, s = add_keys(
                accumulated, m, s, q, k_ptr, v_ptr, first_key + start, length - start, k_stride,
                v_stride, visible, scale, softcap, False, HAS_SOFTCAP, HEAD_SIZE, VALUE_SIZE,
                BLOCK_K, BLOCK_V, BLOCK_N, UPCAST,
            )  # fmt: skip
    out_ptr += head * VALUE_SIZE
    out = accumulated / s[:, None]
    store_rows(out_ptr, first, count, out_stride, out, BLOCK_M, VALUE_SIZE, BLOCK_V)
    row = tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head * num_tokens + first + row, (m + tl.log2(s)) * LN2, row < count)
