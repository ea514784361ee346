"""Triton kernels: gradients of `segment_attention`, from its output and log-sum-exp.

Scores are made again, twice: once for the queries' gradients, whose tiles go down their paths as in
the forward pass, and once for those of keys and values, whose tiles go through the queries of all
heads and tokens that see them. Long ranges of queries are divided among units, whose sums are added
up in order. Nothing is added in an order that could change.
N packed tokens, H query heads, Hkv key heads, K head size of queries and keys, Kv of values.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

import triton
import triton.language as tl

from fastrl_kernels.segment_attention.kernel import (
    LOG2E,
    load_rows,
    path_entry,
    product,
    scores_of,
    store_rows,
)


@triton.jit(do_not_specialize=["num_tokens"])
def deltas_kernel(
    out_ptr, grad_ptr, deltas_ptr, num_tokens, num_heads, out_stride, grad_stride,
    grad_head_stride, VALUE_SIZE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """deltas (H, N) float32: each output times its gradient, as softmax's gradient needs it."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first = (tl.program_id(0) // num_heads).to(tl.int64) * BLOCK_M
    count = num_tokens - first
    out_ptr += head * VALUE_SIZE
    grad_ptr += head * grad_head_stride
    out = load_rows(out_ptr, first, count, out_stride, False, BLOCK_M, VALUE_SIZE, BLOCK_V)
    grad = load_rows(grad_ptr, first, count, grad_stride, False, BLOCK_M, VALUE_SIZE, BLOCK_V)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    row = tl.arange(0, BLOCK_M)
    tl.store(deltas_ptr + head * num_tokens + first + row, delta, row < count)


@triton.jit
def add_query_gradients(
    total, q, grad, lse, delta, k_ptr, v_ptr, first, count, k_stride, v_stride, visible, scale,
    softcap, IS_WHOLE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """total + what one tile of keys adds to the queries' gradients over scale."""
    k = load_rows(k_ptr, first, count, k_stride, IS_WHOLE, BLOCK_N, HEAD_SIZE, BLOCK_K)
    v = load_rows(v_ptr, first, count, v_stride, IS_WHOLE, BLOCK_N, VALUE_SIZE, BLOCK_V)
    zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    scores, slope = scores_of(product(q, tl.trans(k), zeros, UPCAST), scale, softcap, HAS_SOFTCAP)
    p = tl.exp2(scores - lse[:, None])
    if not IS_WHOLE:
        p = tl.where(visible, p, 0.0)
    gradient = p * (product(grad, tl.trans(v), zeros, UPCAST) - delta[:, None]) * slope
    return product(gradient.to(k.dtype), k, total, UPCAST)


@triton.jit(do_not_specialize=["num_tokens", "window"])
def query_gradients_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, deltas_ptr, paths_ptr, query_tiles_ptr, dq_ptr,
    num_tokens, num_heads, num_groups, q_stride, q_head_stride, k_stride, k_head_stride, v_stride,
    v_head_stride, grad_stride, grad_head_stride, dq_stride, scale, softcap, window,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq (N, H, K) of one tile of queries and one head."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    tile_ptr = query_tiles_ptr + 4 * (tl.program_id(0) // num_heads)
    first, offset = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1)
    last_entry = tl.load(tile_ptr + 3) - 1
    count = tl.load(paths_ptr + 3 * last_entry + 1) - offset
    q_ptr += head * q_head_stride
    grad_ptr += head * grad_head_stride
    kv_head = (tl.program_id(0) % num_heads // num_groups).to(tl.int64)
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    q = load_rows(q_ptr, first, count, q_stride, False, BLOCK_M, HEAD_SIZE, BLOCK_K)
    grad = load_rows(grad_ptr, first, count, grad_stride, False, BLOCK_M, VALUE_SIZE, BLOCK_V)
    row = tl.arange(0, BLOCK_M)
    per_row = head * num_tokens + first + row
    lse = tl.load(lse_ptr + per_row, row < count, float("inf")) * LOG2E
    delta = tl.load(deltas_ptr + per_row, row < count, 0.0)

    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for entry in range(tl.load(tile_ptr + 2), last_entry + 1):
        first_key, length, masked, end, first_seen, last_seen = path_entry(
            paths_ptr, entry, last_entry, offset, window, HAS_WINDOW, BLOCK_M, BLOCK_N
        )
        for start in range(0, 0 if HAS_WINDOW else masked, BLOCK_N):
            total = add_query_gradients(
                total, q, grad, lse, delta, k_ptr, v_ptr, first_key + start, length - start,
                k_stride, v_stride, True, scale, softcap, True, HAS_SOFTCAP, HEAD_SIZE,
                VALUE_SIZE, BLOCK_K, BLOCK_V, BLOCK_N, UPCAST,
            )  # fmt: skip
        for start in range(masked, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            visible = key[None, :] <= last_seen[:, None]
            if HAS_WINDOW:
                visible = visible & (key[None, :] >= first_seen[:, None])
            total = add_query_gradients(
                total, q, grad, lse, delta, k_ptr, v_ptr, first_key + start, length - start,
                k_stride, v_stride, visible, scale, softcap, False, HAS_SOFTCAP, HEAD_SIZE,
                VALUE_SIZE, BLOCK_K, BLOCK_V, BLOCK_N, UPCAST,
            )  # fmt: skip
    dq_ptr += head * HEAD_SIZE
    store_rows(dq_ptr, first, count, dq_stride, total * scale, BLOCK_M, HEAD_SIZE, BLOCK_K)


@triton.jit
def add_key_gradients(
    dk, dv, k, v, q_ptr, grad_ptr, lse_ptr, deltas_ptr, first, count, q_stride, grad_stride,
    visible, scale, softcap, HAS_SOFTCAP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk over scale and dv after one more block of queries; visible: (BLOCK_N, BLOCK_M)."""
    q = load_rows(q_ptr, first, count, q_stride, False, BLOCK_M, HEAD_SIZE, BLOCK_K)
    grad = load_rows(grad_ptr, first, count, grad_stride, False, BLOCK_M, VALUE_SIZE, BLOCK_V)
    row = tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + first + row, row < count, float("inf")) * LOG2E
    delta = tl.load(deltas_ptr + first + row, row < count, 0.0)
    zeros = tl.zeros([k.shape[0], BLOCK_M], tl.float32)
    scores, slope = scores_of(product(k, tl.trans(q), zeros, UPCAST), scale, softcap, HAS_SOFTCAP)
    p = tl.where(visible, tl.exp2(scores - lse[None, :]), 0.0)
    dv = product(p.to(grad.dtype), grad, dv, UPCAST)
    gradient = p * (product(v, tl.trans(grad), zeros, UPCAST) - delta[None, :]) * slope
    return product(gradient.to(q.dtype), q, dk, UPCAST), dv


@triton.jit(do_not_specialize=["num_tokens", "window"])
def key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, deltas_ptr, positions_ptr, key_units_ptr, dk_ptr,
    dv_ptr, dk_sums_ptr, dv_sums_ptr, num_tokens, num_kv_heads, num_groups, q_stride,
    q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, grad_stride,
    grad_head_stride, dk_stride, dv_stride, scale, softcap, window,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk (N, Hkv, K) and dv (N, Hkv, Kv) of a tile of keys, or a unit's part of their sums.

    A step is BLOCK_M queries of one of the heads that share the key head; sums: (slots, Hkv,
    BLOCK_N, size) float32.
    """
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    unit_ptr = key_units_ptr + 8 * (tl.program_id(0) // num_kv_heads)
    first, num_keys = tl.load(unit_ptr).to(tl.int64), tl.load(unit_ptr + 1)
    num_queries = tl.load(unit_ptr + 3) - tl.load(unit_ptr)
    key = tl.arange(0, BLOCK_N)
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    k = load_rows(k_ptr, first, num_keys, k_stride, False, BLOCK_N, HEAD_SIZE, BLOCK_K)
    v = load_rows(v_ptr, first, num_keys, v_stride, False, BLOCK_N, VALUE_SIZE, BLOCK_V)
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    steps_per_head = tl.load(unit_ptr + 4)
    for step in range(tl.load(unit_ptr + 5), tl.load(unit_ptr + 6)):
        head = kv_head * num_groups + step // steps_per_head
        start = step % steps_per_head * BLOCK_M
        query = start + tl.arange(0, BLOCK_M)
        visible = query[None, :] >= key[:, None]
        any_visible = True
        if HAS_WINDOW:
            # Queries of other segments may be far down their path, or may not be.
            position = tl.load(positions_ptr + first + query, query < num_queries, 2147483647)
            seen_from = position - tl.load(unit_ptr + 2) - window
            visible = visible & (key[:, None] > seen_from[None, :])
            any_visible = tl.min(seen_from, 0) < BLOCK_N - 1
        if any_visible:
            dk, dv = add_key_gradients(
                dk, dv, k, v, q_ptr + head * q_head_stride, grad_ptr + head * grad_head_stride,
                lse_ptr + head * num_tokens, deltas_ptr + head * num_tokens, first + start,
                num_queries - start, q_stride, grad_stride, visible, scale, softcap, HAS_SOFTCAP,
                HEAD_SIZE, VALUE_SIZE, BLOCK_K, BLOCK_V, BLOCK_M, UPCAST,
            )  # fmt: skip
    dk *= scale
    slot = tl.load(unit_ptr + 7).to(tl.int64)
    if slot < 0:
        dk_ptr += kv_head * HEAD_SIZE
        dv_ptr += kv_head * VALUE_SIZE
        store_rows(dk_ptr, first, num_keys, dk_stride, dk, BLOCK_N, HEAD_SIZE, BLOCK_K)
        store_rows(dv_ptr, first, num_keys, dv_stride, dv, BLOCK_N, VALUE_SIZE, BLOCK_V)
    else:
        row = (slot * num_kv_heads + kv_head) * BLOCK_N
        store_rows(dk_sums_ptr, row, num_keys, HEAD_SIZE, dk, BLOCK_N, HEAD_SIZE, BLOCK_K)
        store_rows(dv_sums_ptr, row, num_keys, VALUE_SIZE, dv, BLOCK_N, VALUE_SIZE, BLOCK_V)


@triton.jit
def sum_units_kernel(
    sums_ptr, key_splits_ptr, out_ptr, num_kv_heads, out_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys or of the values of one tile: the sums of its units, in their order."""
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    split_ptr = key_splits_ptr + 4 * (tl.program_id(0) // num_kv_heads)
    num_keys, first_slot = tl.load(split_ptr + 1), tl.load(split_ptr + 2).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK], tl.float32)
    for index in range(tl.load(split_ptr + 3)):
        row = ((first_slot + index) * num_kv_heads + kv_head) * BLOCK_N
        total += load_rows(sums_ptr, row, num_keys, SIZE, False, BLOCK_N, SIZE, BLOCK)
    first = tl.load(split_ptr).to(tl.int64)
    store_rows(out_ptr + kv_head * SIZE, first, num_keys, out_stride, total, BLOCK_N, SIZE, BLOCK)
