"""Attention and decoding at real sizes on a GPU that is not there, forward and backward.

What `dry_run` checks of every launch is not repeated here: grids, devices, strides, whether the
front end builds it, whether anything waits for the device. Tables of tiles are real numbers.
N packed tokens, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values, P
groups of R rows, L prefix columns, C suffix columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

pytest.importorskip("triton")

from fastrl_kernels import Segments, decode_attention, make_segments, segment_attention
from fastrl_kernels.decode_attention.op import decode_attention_op
from fastrl_kernels.decode_attention.workspace import workspace_bytes
from fastrl_kernels.segment_attention import launch
from fastrl_kernels.segment_attention.tiles import Sizes, Tiles, make_tiles
from fastrl_kernels.segment_attention.triton_op import (
    segment_attention_gradients_op,
    segment_attention_op,
)
from fastrl_kernels.segment_attention.workspace import NUM_PROCESSORS, bytes_inside
from tests.kernels.dry_run import DEVICE, MARKS, Run, dry_run

pytestmark = MARKS
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER = SimpleNamespace(major=9, minor=0, multi_processor_count=NUM_PROCESSORS)
Forest = tuple[list[int], list[int]]


def groups(num_groups: int, prompt: int, completion: int, num_completions: int) -> Forest:
    lengths = [prompt, *[completion] * num_completions] * num_groups
    parents = []
    for group in range(num_groups):
        parents += [-1, *[group * (num_completions + 1)] * num_completions]
    return lengths, parents


FORESTS: dict[str, Forest] = {  # 64k tokens, but for the last ones
    "groups": groups(8, 2048, 512, 12),
    "long prompt": groups(1, 32768, 1024, 32),
    "one sequence": ([65536], [-1]),
    "short completions": groups(64, 512, 8, 64),
    "a prompt and its group": groups(1, 8192, 1024, 8),
    "one token": ([1], [-1]),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    operators = segment_attention_op, segment_attention_gradients_op, decode_attention_op
    monkeypatch.setattr("tests.kernels.dry_run.OPERATORS", operators)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: HOPPER)
    monkeypatch.setattr(launch, "tiles_of", tiles_on_device)
    with dry_run(monkeypatch) as found:
        yield found


def tiles_on_device(segments: Segments, sizes: Sizes) -> Tiles:
    """The tables of a forest, whose numbers are looked at before they leave the CPU."""
    with unset_fake_temporarily():
        tiles = make_tiles(segments.host, sizes)
        check_tables(tiles, segments.host, sizes)
    return Tiles(*(as_fake(x) if isinstance(x, Tensor) else x for x in tiles))


def check_tables(tiles: Tiles, segments: Segments, sizes: Sizes) -> None:
    """Every query in one tile, the work on every tile of keys in its units, all within bounds."""
    num_tokens = segments.num_tokens
    first, offset, entry, end = tiles.query_tiles.unbind(1)
    lengths = tiles.paths[end - 1, 1] - offset
    count = lengths.clamp(max=sizes.query_tile)
    covered = torch.zeros(num_tokens + 1, dtype=torch.int32)
    covered.index_add_(0, first, torch.ones_like(first)).index_add_(
        0, first + count, -torch.ones_like(first)
    )
    assert (covered.cumsum(0)[:-1] == 1).all()
    assert (entry < end).all()
    assert (tiles.paths[:, 0] + tiles.paths[:, 1] <= num_tokens).all()
    key, num_keys, _, queries_end, steps_per_head, begin, until, slot = tiles.key_units.unbind(1)
    assert (key + num_keys <= queries_end).all()
    assert (queries_end <= num_tokens).all()
    assert (begin < until).all()
    steps = torch.zeros(num_tokens, dtype=torch.int32).index_add_(0, key, until - begin)
    assert (steps[key] == steps_per_head * sizes.num_groups).all()
    assert sorted(slot[slot >= 0].tolist()) == list(range(tiles.num_slots))
    assert int(tiles.key_splits[:, 3].sum()) == tiles.num_slots


def as_fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=DEVICE)


def segments_of(forest: str) -> Segments:
    with unset_fake_temporarily():
        host = make_segments(*FORESTS[forest])
    names = [field.name for field in dataclasses.fields(host) if field.name != "on_cpu"]
    return Segments(**{name: as_fake(getattr(host, name)) for name in names}, on_cpu=host)


def projected(num_tokens: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype,
              layout: str) -> list[Tensor]:  # fmt: skip
    """q, k and v as models make them: each on its own, out of one product, or head by head."""
    shapes = [(heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])]
    if layout == "one product":
        row = torch.empty(num_tokens, sum(H * K for H, K in shapes), dtype=dtype, device=DEVICE)
        parts = row.split([H * K for H, K in shapes], 1)
        found = [x.view(num_tokens, *shape) for x, shape in zip(parts, shapes, strict=True)]
    elif layout == "heads first":
        found = [
            torch.empty(H, num_tokens, K, dtype=dtype, device=DEVICE).transpose(0, 1)
            for H, K in shapes
        ]
    else:
        found = [torch.empty(num_tokens, *x, dtype=dtype, device=DEVICE) for x in shapes]
    return [x.detach().requires_grad_() for x in found]


def attend(
    run: Run, forest: str, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype,
    layout: str = "each", *, has_sinks: bool = False, **options: Any,
) -> Segments:  # fmt: skip
    """Forward and backward, by the public function."""
    segments = segments_of(forest)
    tensors = projected(segments.num_tokens, heads, sizes, dtype, layout)
    sinks = torch.empty(heads[0], device=DEVICE, requires_grad=True) if has_sinks else None
    out = segment_attention(*tensors, segments, sinks=sinks, **options)
    assert out.shape == (segments.num_tokens, heads[0], sizes[1])
    run.backward()
    return segments


@pytest.mark.parametrize(
    ("forest", "heads", "sizes", "dtype", "layout"),
    [
        ("groups", (16, 8), (128, 128), BF16, "each"),
        ("long prompt", (32, 8), (128, 128), BF16, "one product"),
        ("long prompt", (14, 2), (64, 64), FP16, "heads first"),
        ("one sequence", (64, 8), (128, 128), BF16, "one product"),
        ("short completions", (8, 1), (256, 256), BF16, "each"),
        ("a prompt and its group", (16, 8), (128, 128), FP32, "heads first"),
        ("a prompt and its group", (16, 16), (192, 128), BF16, "each"),
        ("a prompt and its group", (8, 4), (256, 256), FP32, "each"),
        ("a prompt and its group", (12, 12), (80, 80), BF16, "one product"),
        ("one token", (16, 8), (128, 128), BF16, "each"),
    ],
)
def test_segment_attention(run, forest, heads, sizes, dtype, layout):
    segments = attend(run, forest, heads, sizes, dtype, layout)
    launched = {"forward_kernel", "deltas_kernel", "query_gradients_kernel", "key_gradients_kernel"}
    assert launched <= run.counts().keys()
    of_a_token = heads[0] * (sizes[0] + 2 * sizes[1]) + heads[1] * sum(sizes)
    outside = segments.num_tokens * (of_a_token * dtype.itemsize + 4 * heads[0])  # lse
    outside -= segments.num_tokens * heads[0] * sizes[1] * dtype.itemsize  # the gradient given
    with unset_fake_temporarily():
        inside = bytes_inside(
            segments.host, num_heads=heads[0], num_kv_heads=heads[1], head_size=sizes[0],
            value_size=sizes[1], dtype=dtype, window=None,
        )  # fmt: skip
    assert run.peak_bytes == outside + inside  # what `fastrl plan` says


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (BF16, {"window": 4096}), (BF16, {"softcap": 50.0, "scale": 1}),
        (FP32, {"window": 1, "softcap": 20.0}),
    ],
)  # fmt: skip
def test_segment_attention_with_options(run, dtype, options):
    attend(run, "a prompt and its group", (16, 8), (128, 128), dtype, has_sinks=True, **options)
    assert len(run.launches) >= 4


def test_segment_attention_builds_few_kernels(run):
    """However many tokens there are; a row alone is no exception."""
    for forest in ("one token", "groups", "a prompt and its group", "short completions"):
        attend(run, forest, (16, 8), (128, 128), BF16, window=512)
    assert {name: len(run.builds(name)) for name in run.counts()} == dict.fromkeys(
        ("forward_kernel", "deltas_kernel", "query_gradients_kernel", "key_gradients_kernel",
         "sum_units_kernel"), 1
    )  # fmt: skip


def decode(
    num_groups: int, num_rows: int, columns: tuple[int, int], heads: tuple[int, int],
    sizes: tuple[int, int], dtype: torch.dtype, *, length: int | None = None, **options: Any,
) -> list[Tensor]:  # fmt: skip
    """A step of P * R rows; without a length it is on the device."""
    rows, (prefix, suffix) = num_groups * num_rows, columns
    tensors = [
        torch.empty(shape, dtype=dtype, device=DEVICE)
        for shape in (
            (rows, heads[0], sizes[0]),
            *[(num_groups, heads[1], prefix, size) for size in sizes],
            *[(rows, heads[1], suffix, size) for size in sizes],
        )
    ]
    numbers = [torch.empty(n, dtype=torch.int32, device=DEVICE) for n in (rows, num_groups)]
    on_device = torch.empty((), dtype=torch.int32, device=DEVICE)
    out = decode_attention(
        *tensors, row_groups=numbers[0], prefix_lengths=numbers[1],
        suffix_length=on_device if length is None else length, **options,
    )  # fmt: skip
    assert out.shape == (rows, heads[0], sizes[1])
    return tensors


@pytest.mark.parametrize(
    ("num_groups", "num_rows", "columns", "heads", "sizes", "dtype"),
    [
        (8, 16, (2048, 512), (16, 8), (128, 128), BF16),
        (1, 8, (8192, 1024), (32, 8), (128, 128), BF16),
        (8, 16, (2048, 512), (14, 2), (64, 64), FP16),
        (8, 16, (1024, 4096), (8, 1), (256, 256), BF16),
        (64, 16, (2048, 16384), (32, 8), (128, 128), BF16),  # 2^34 numbers
        (8, 16, (2048, 512), (19, 1), (80, 40), FP32),
        (8, 16, (2048, 512), (8, 8), (256, 256), FP32),
        (1, 1, (1, 1), (2, 1), (64, 64), BF16),
        (1, 4, (0, 64), (4, 2), (64, 64), BF16),
    ],
)
def test_decode_attention(run, num_groups, num_rows, columns, heads, sizes, dtype):
    tensors = decode(num_groups, num_rows, columns, heads, sizes, dtype)
    expected = {"parts_kernel": 1 + (columns[0] > 0), "merge_kernel": 1}
    assert run.counts() == expected | ({"tiles_kernel": 1} if columns[0] else {})
    q, prefix_k, _, suffix_k, suffix_v = tensors
    inside = workspace_bytes(
        q, prefix_k, suffix_k, suffix_v, suffix_length=columns[1], window=None,
        implementation="triton",
    )  # fmt: skip
    rows = num_groups * num_rows
    out = rows * heads[0] * sizes[1] * dtype.itemsize
    tiles = run.peak_bytes - inside - out
    assert 0 <= tiles <= 16 * (rows * heads[0] + num_groups)


def test_decode_attention_builds_few_kernels(run):
    """However long completions are, however many rows go on, on the host or on the device."""
    sinks = torch.empty(16, device=DEVICE)
    for has_length in (True, False):
        for num_groups, num_rows, length in ((8, 16, 1), (8, 16, 257), (3, 5, 63), (1, 1, 64)):
            decode(
                num_groups, num_rows, (1000, 512), (16, 8), (128, 128), BF16,
                length=length if has_length else None, window=4000, sinks=sinks,
            )  # fmt: skip
    kinds = {name: len(run.builds(name)) for name in run.counts()}
    # Prefixes and suffixes, each with the length on the host and on the device.
    assert kinds == {"tiles_kernel": 1, "parts_kernel": 4, "merge_kernel": 1}
