"""segment_attention's kernels against explicit softmax in float64, and bit for bit across rows.

N packed tokens, H query heads, Hkv key heads, K head size of queries and keys, Kv of values.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastrl_kernels import Segments, make_segments, segment_attention
from fastrl_kernels.segment_attention import launch
from fastrl_kernels.segment_attention.reference import segment_attention_reference
from fastrl_kernels.segment_attention.triton_op import (
    segment_attention_gradients_op,
    segment_attention_op,
    segment_attention_triton,
)
from tests.kernels.interpreted.test_wide_offsets import LIMIT, far_apart

# Ragged modulo the interpreter's tiles of 32 queries or keys, 16 keys or queries at a time.
PROMPT = ([35, 1, 0, 19, 8], [-1, 0, 0, 0, 0])
DEEP = ([3, 17, 0, 1, 33, 2, 0, 4], [-1, 0, 1, 2, 3, 4, 3, -1])
PLAIN = ([33, 0, 1, 16], [-1] * 4)
FORESTS = {"prompt": PROMPT, "deep": DEEP, "plain": PLAIN}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(num_tokens: int, heads: int, kv_heads: int, size: int, value_size: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, float32."""
    shapes = ((heads, size), (kv_heads, size), (kv_heads, value_size), (heads, value_size))
    return [normal(num_tokens, *shape, seed=seed) for seed, shape in enumerate(shapes)]


def run(
    function: Any, tensors: Sequence[Tensor], segments: Segments, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and gradients of q, k, v and sinks if there are any."""
    *leaves, grad = [x.detach() for x in tensors]
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].to(torch.promote_types(grad.dtype, torch.float32))
        leaves.append(options["sinks"])
    for leaf in leaves:
        leaf.requires_grad_()
    out = function(*leaves[:3], segments, **options)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


def check(tensors: Sequence[Tensor], segments: Segments, **options: Any) -> None:
    """float32 against float64: 2e-6 of outputs, 1e-5 of the largest gradient."""
    out, gradients = run(segment_attention_triton, tensors, segments, **options)
    wide = [x.double() for x in tensors]
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].double()
    truth, expected = run(segment_attention_reference, wide, segments, **options)
    assert out.dtype == torch.float32
    assert (out - truth).abs().max() <= 2e-6
    for got, wanted in zip(gradients, expected, strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


SINKS = torch.tensor([-2.0, 0.5, 3.0])


@pytest.mark.parametrize(
    ("forest", "heads", "sizes", "options"),
    [
        ("prompt", (3, 1), (13, 64), {"sinks": SINKS}),
        ("prompt", (2, 2), (80, 24), {"window": 21}),
        ("prompt", (6, 1), (16, 13), {"softcap": 1.5, "scale": 0.7}),
        ("deep", (3, 3), (13, 80), {"window": 4, "softcap": 2.0, "sinks": SINKS}),
        ("deep", (2, 1), (64, 64), {}),
        ("plain", (1, 1), (32, 13), {"window": 2, "scale": -1.3}),
        ("plain", (1, 1), (13, 13), {"window": 1000}),
    ],
)
def test_values_and_gradients(
    forest: str, heads: tuple[int, int], sizes: tuple[int, int], options: dict[str, Any]
) -> None:
    segments = make_segments(*FORESTS[forest])
    check(inputs(segments.num_tokens, *heads, *sizes), segments, **options)


def test_keys_of_a_prompt_are_divided_and_those_of_short_rows_are_not() -> None:
    shared, alone = make_segments(*PROMPT), make_segments([5], [-1])
    q, k, v, _ = inputs(shared.num_tokens, 3, 1, 13, 13)
    tiles = launch.attention_tiles(q, k, v, shared, None)
    assert tiles.key_splits[:, 3].sum() == tiles.num_slots > 0
    assert launch.attention_tiles(q, k, v, shared, None) is tiles
    assert launch.attention_tiles(q[:5], k[:5], v[:5], alone, None).num_slots == 0


def paths(lengths: Sequence[int], parents: Sequence[int]) -> Iterator[Tensor]:
    """Tokens on the way to each leaf."""
    starts = make_segments(lengths, parents).starts.tolist()
    for leaf in set(range(len(lengths))) - set(parents):
        tokens: list[int] = []
        above = leaf
        while above >= 0:
            tokens = [*range(starts[above], starts[above] + lengths[above]), *tokens]
            above = parents[above]
        yield torch.tensor(tokens)


def repeated_rows(forest: tuple[list[int], list[int]]) -> Any:
    """What everybody does: one row per leaf, PyTorch's attention in the dtype of the inputs."""

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype)
        written = torch.zeros(q.shape[0], dtype=torch.bool)
        for tokens in paths(*forest):
            row = [x[tokens].transpose(0, 1)[None] for x in (q, k, v)]
            values = scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True)
            new = ~written[tokens]  # a prompt's outputs count once
            out = out.index_put((tokens[new],), values[0].transpose(0, 1)[new])
            written[tokens] = True
        return out

    return attend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("forest", "heads"), [("prompt", (3, 1)), ("deep", (1, 1))])
def test_low_precision(forest: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """At most 1.1 times the error of PyTorch's attention in the same dtype, row by row."""
    segments = make_segments(*FORESTS[forest])
    tensors = [x.to(dtype) for x in inputs(segments.num_tokens, *heads, 64, 64)]
    out, gradients = run(segment_attention_triton, tensors, segments)
    truth = run(segment_attention_reference, [x.double() for x in tensors], segments)
    pytorch = run(repeated_rows(FORESTS[forest]), tensors, segments)
    for got, wanted, other in zip(
        (out, *gradients), (truth[0], *truth[1]), (pytorch[0], *pytorch[1]), strict=True
    ):
        assert got.dtype == dtype
        assert (got - wanted).norm() <= 1.1 * (other - wanted).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_inputs_give_the_same_bits(dtype: torch.dtype) -> None:
    segments = make_segments(*PROMPT)
    tensors = [x.to(dtype) for x in inputs(segments.num_tokens, 3, 1, 13, 13)]
    options = {"window": 40, "sinks": SINKS}
    first, second = (run(segment_attention_triton, tensors, segments, **options) for _ in range(2))
    for one, other in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"window": 21, "softcap": 2.0, "sinks": SINKS}])
def test_a_completion_alone_and_among_others(options: dict[str, Any]) -> None:
    """Bit for bit, whatever the others hold."""
    lengths, parents = [5, 3, *PROMPT[0], 9], [-1, 0, -1, 2, 2, 2, 2, -1]
    segments = make_segments(lengths, parents)
    tensors = [x.bfloat16() for x in inputs(segments.num_tokens, 3, 1, 13, 13)]
    kept = torch.cat([torch.arange(8, 43), torch.arange(44, 63)])  # a prompt and a completion
    others = torch.ones(segments.num_tokens, dtype=torch.bool)
    others[kept] = False
    alone = run(
        segment_attention_triton, [x[kept] for x in tensors], make_segments([35, 19], [-1, 0]),
        **options,
    )  # fmt: skip
    for x in tensors:
        x[others] = torch.nan
    row = run(segment_attention_triton, tensors, segments, **options)
    assert torch.equal(row[0][kept], alone[0])
    assert torch.equal(row[1][0][kept], alone[1][0])
    completion = kept[35:]
    for got, wanted in zip(row[1][1:3], alone[1][1:3], strict=True):
        torch.testing.assert_close(got[completion], wanted[35:])
    assert row[0][others].isnan().all()


def test_a_shared_row_gives_the_bits_of_separate_rows() -> None:
    """Where a prompt ends with a tile of queries, the tiles of both rows are the same."""
    tensors = inputs(32 + 19, 2, 1, 13, 13)
    shared = run(segment_attention_triton, tensors, make_segments([32, 19], [-1, 0]))
    separate = run(segment_attention_triton, tensors, make_segments([51], [-1]))
    assert torch.equal(shared[0], separate[0])
    assert torch.equal(shared[1][0], separate[1][0])


def test_any_strides() -> None:
    """Heads before tokens, elements apart, a gradient that is one number repeated."""
    segments = make_segments([9, 8, 3], [-1, 0, 0])
    q, k, v, grad = inputs(20, 2, 1, 13, 13)
    tensors = [
        q.transpose(0, 1).contiguous().transpose(0, 1), k.repeat_interleave(2, 2)[..., ::2],
        torch.cat([v, v * torch.nan], 1)[:, :1], grad[:1, :1, :1].expand_as(grad),
    ]  # fmt: skip
    assert not any(x.is_contiguous() for x in tensors)
    check(tensors, segments)


def test_offsets_past_32_bits(tmp_path: Path) -> None:
    near = inputs(3, 2, 1, 13, 13)
    far = [
        far_apart(x.flatten(1), tmp_path / str(index)).unflatten(1, x.shape[1:])
        for index, x in enumerate(near)
    ]
    assert all(x[-1].storage_offset() > LIMIT for x in far)
    check(far, make_segments([1, 2], [-1, 0]), window=2)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens(lengths: list[int]) -> None:
    segments = make_segments(lengths, [-1] * len(lengths))
    out, gradients = run(segment_attention_triton, inputs(0, 3, 1, 13, 5), segments, sinks=SINKS)
    assert out.shape == (0, 3, 5)
    assert [x.shape for x in gradients] == [(0, 3, 13), (0, 1, 13), (0, 1, 5), (3,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_too_large_raises(dtype: torch.dtype) -> None:
    q, k, v, _ = (x.to(dtype) for x in inputs(2, 1, 1, 16, 257))
    with pytest.raises(ValueError, match="at most 256"):
        segment_attention_triton(q, k, v, make_segments([2], [-1]))


def test_the_operators_keep_their_contracts() -> None:
    segments = make_segments([5, 3, 2], [-1, 0, 0])
    q, k, v, grad = inputs(10, 3, 1, 13, 5)
    tiles = launch.attention_tiles(q, k, v, segments, 4)
    arguments = (q, k, v, SINKS, *tiles, 0.3, 4, None)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for x in arguments[:4]:
        x.requires_grad_()
    torch.library.opcheck(segment_attention_op, arguments, test_utils=utils)
    out, lse = (x.detach() for x in segment_attention_op(*arguments))
    with torch.no_grad():
        torch.library.opcheck(
            segment_attention_gradients_op, (grad, out, lse, *arguments), test_utils=utils[::2]
        )


def test_the_public_function_takes_the_kernels() -> None:
    segments = make_segments([5, 3, 4], [-1, 0, 0])
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(12, heads, 16, generator=generator) for heads in (4, 2, 2))
    expected = segment_attention_triton(
        q, k, v, segments, scale=0.25, window=None, softcap=None, sinks=None
    )
    assert torch.equal(segment_attention(q, k, v, segments, implementation="triton"), expected)
    wide = torch.zeros(12, 1, 264)
    with pytest.raises(ValueError, match="heads of at most 256"):
        segment_attention(wide, wide, wide, segments, implementation="triton")
