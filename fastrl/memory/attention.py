"""What segment attention takes inside, beside its inputs and outputs.

Legend: H heads, Hkv key-value heads, K head size of queries and keys, Kv of values.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastrl.integrations.block import current_block
from fastrl.memory.ledger import Inside, Ledger, inside_of
from fastrl_kernels import Segments
from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.segment_attention import paths, short_paths
from fastrl_kernels.segment_attention.forest import Forest, forest_of
from fastrl_kernels.segment_attention.scores import Options
from fastrl_kernels.segments import make_segments


class Attention(NamedTuple):
    """What a call depends on besides its row."""

    device: str
    dtype: torch.dtype
    heads: tuple[int, int]  # H, Hkv
    sizes: tuple[int, int]  # K, Kv
    options: Options
    has_sinks: bool
    is_backward: bool

    def bytes_of(self, work: Any) -> int:
        """Of a pass."""
        return self.bytes_on(work.segments)

    def bytes_on(self, segments: Segments) -> int:
        """Most bytes beside inputs and outputs on a forest, whose numbers are on the CPU."""
        host = segments.host
        numbers = (x.numpy().tobytes() for x in (host.lengths, host.parents))
        return _bytes_inside(self, *numbers)


def attention_inside(ledger: Ledger, args: tuple[Any, ...], *, is_backward: bool) -> Inside:
    """Of `fastrl::path_attention`, and what other code would take and keep on a GPU."""
    q, k, v, sinks = args[2:6] if is_backward else args[:4]
    block = current_block.get()
    if block is not None and block.segments is not None:
        ledger.segments = block.segments.host
    assert ledger.segments is not None
    attention = Attention(
        ledger.device, q.dtype, (q.shape[1], k.shape[1]), (q.shape[2], v.shape[2]),
        Options(*args[-3:]), sinks is not None, is_backward,
    )  # fmt: skip
    inside = Inside("attention", attention.bytes_on(ledger.segments), attention.bytes_of)
    if ledger.device == "cuda" and not is_backward:  # the log-sum-exp is an output there
        return inside._replace(kept_bytes=4 * q.shape[0] * q.shape[1])
    return inside


@functools.lru_cache(maxsize=256)
def _bytes_inside(attention: Attention, lengths: bytes, parents: bytes) -> int:
    numbers = [memoryview(x).cast("q").tolist() for x in (lengths, parents)]
    if attention.device == "cuda":
        return _bytes_of_kernels(attention, make_segments(*numbers))
    return _bytes_of_paths(attention, forest_of(*numbers))


def _bytes_of_paths(attention: Attention, forest: Forest) -> int:
    """On a CPU."""
    shown = _shown(forest)
    (H, Hkv), (K, Kv) = attention.heads, attention.sizes
    q, k, v, out = (
        torch.empty(sum(shown.lengths), heads, size, dtype=attention.dtype, device="meta")
        for heads, size in ((H, K), (Hkv, K), (Hkv, Kv), (H, Kv))
    )
    sinks = torch.empty(H, dtype=attention.dtype, device="meta") if attention.has_sinks else None
    short = [
        short_paths.Batch(*(x.to("meta") for x in batch)) for batch in short_paths.batches(shown, H)
    ]
    tables = paths.Tables(shown, short)
    if not attention.is_backward:
        return inside_of(lambda: paths.forward(q, k, v, sinks, tables, attention.options))
    taken = inside_of(lambda: paths.backward(out, out, q, k, v, sinks, tables, attention.options))
    sums = accumulation_dtype(attention.dtype)
    if sums == attention.dtype:
        return taken
    # Sums of the gradients of keys and values, of all tokens, which are rounded in the end.
    num_tokens, values = sum(forest.lengths), Hkv * (K + Kv)
    missing = num_tokens - sum(shown.lengths)
    along_paths = taken + missing * values * (sums.itemsize - attention.dtype.itemsize)
    return max(along_paths, num_tokens * values * sums.itemsize)


def _shown(forest: Forest) -> Forest:
    """The segments that show the highest moment: those on short paths, and one longest path."""
    ends = forest.ends
    longest = max(range(len(ends)), key=ends.__getitem__)
    kept = {index for index, end in enumerate(ends) if end <= short_paths.MAX_PATH}
    while longest >= 0:
        kept.add(longest)
        longest = forest.parents[longest]
    order = sorted(kept)
    number = {segment: index for index, segment in enumerate(order)} | {-1: -1}
    return forest_of(
        [forest.lengths[segment] for segment in order],
        [number[forest.parents[segment]] for segment in order],
    )


def _bytes_of_kernels(attention: Attention, segments: Segments) -> int:
    """On a GPU."""
    from fastrl_kernels.segment_attention.workspace import bytes_inside

    if not attention.is_backward:
        return 0
    (H, Hkv), (K, Kv) = attention.heads, attention.sizes
    return bytes_inside(
        segments, num_heads=H, num_kv_heads=Hkv, head_size=K, value_size=Kv,
        dtype=attention.dtype, window=attention.options.window,
    )  # fmt: skip
