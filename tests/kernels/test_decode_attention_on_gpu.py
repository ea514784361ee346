"""decode_attention on an NVIDIA GPU; needs torch, triton and pytest there, nothing else.

R rows, P groups, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values.
"""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import decode_attention
from fastrl_kernels.decode_attention import decode_attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(64, 64), (128, 128), (80, 40), (256, 256)]
HEADS = [(8, 8), (6, 2), (19, 1)]
OPTIONS: list[dict[str, Any]] = [{}, {"window": 700, "softcap": 20.0}]
# Every dtype with every size and options, heads in turn: all combinations would take minutes to
# compile.
CASES = [
    (dtype, sizes, HEADS[(index + index // 3) % 3], options)
    for index, (sizes, options, dtype) in enumerate(itertools.product(SIZES, OPTIONS, DTYPES))
]


def decode_inputs(
    dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int]
) -> tuple[list[Tensor], dict[str, Any]]:
    """Groups of 9, 0, 1 and 22 rows, prefixes of 300, 5, 0 and 1031 tokens; NaN behind tokens."""
    groups = torch.repeat_interleave(torch.tensor([9, 0, 1, 22])).int().cuda()
    lengths = torch.tensor([300, 5, 0, 1031], dtype=torch.int32, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(32, heads[0], sizes[0])]
    shapes += [(4, heads[1], 1100, size) for size in sizes]
    shapes += [(32, heads[1], 600, size) for size in sizes]
    tensors = [torch.randn(x, generator=generator, device="cuda").to(dtype) for x in shapes]
    for x in tensors[1:3]:
        x.masked_fill_(
            (torch.arange(1100, device="cuda") >= lengths[:, None])[:, None, :, None], torch.nan
        )
    for x in tensors[3:]:
        x[:, :, 333:] = torch.nan
    where = {"row_groups": groups, "prefix_lengths": lengths}
    return tensors, {**where, "suffix_length": torch.tensor(333, dtype=torch.int32, device="cuda")}


@pytest.mark.parametrize(("dtype", "sizes", "heads", "options"), CASES)
def test_decode_attention(
    dtype: torch.dtype, sizes: tuple[int, int], heads: tuple[int, int], options: dict[str, Any]
) -> None:
    """Against float64, the same bits twice, and those of a row alone."""
    tensors, where = decode_inputs(dtype, heads, sizes)
    if options:
        options = {**options, "sinks": torch.linspace(-1, 2, heads[0], device="cuda")}
    by_kernels = functools.partial(decode_attention, implementation="triton", **options)
    out = by_kernels(*tensors, **where)
    wide = [x.double() for x in tensors]
    truth = decode_attention_reference(*wide, **where, **options)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    assert (out - truth).norm() / truth.norm() < tolerance
    assert torch.equal(by_kernels(*tensors, **where), out)
    where["suffix_length"] = 333
    assert torch.equal(by_kernels(*tensors, **where), out)
    q, prefix_k, prefix_v, suffix_k, suffix_v = tensors
    alone = by_kernels(
        q[20:21], prefix_k[3:], prefix_v[3:], suffix_k[20:21], suffix_v[20:21],
        row_groups=where["row_groups"][:1], prefix_lengths=where["prefix_lengths"][3:],
        suffix_length=333,
    )  # fmt: skip
    assert torch.equal(alone[0], out[20])


def test_a_graph_captures_decode_attention_and_replays_it_for_longer_rows() -> None:
    tensors, where = decode_inputs(torch.bfloat16, (6, 2), (64, 64))
    for x in tensors[3:]:
        x.nan_to_num_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decode_attention(*tensors, **where)
        torch.cuda.set_sync_debug_mode("error")
        try:
            decode_attention(*tensors, **where)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_attention(*tensors, **where)
    for length in (1, 333, 600):
        where["suffix_length"].fill_(length)
        graph.replay()
        assert torch.equal(
            captured, decode_attention(*tensors, **{**where, "suffix_length": length})
        )


def test_decode_attention_by_products() -> None:
    """PyTorch's path on a GPU, where it is only taken for float64 and wide heads."""
    tensors, where = decode_inputs(torch.float64, (6, 2), (80, 40))
    truth = decode_attention_reference(*tensors, **where, window=700)
    torch.testing.assert_close(decode_attention(*tensors, **where, window=700), truth)
