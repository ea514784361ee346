"""Segment attention against explicit softmax in float64, and against separate rows."""

import pytest
import torch
from torch import Tensor

from fastrl_kernels import make_segments, segment_attention
from fastrl_kernels.segment_attention import segment_attention_reference

LENGTHS = [7, 5, 0, 3, 6, 4, 9]
PARENTS = [-1, 0, 0, 0, 3, 3, -1]
NUM_TOKENS = sum(LENGTHS)


def inputs(
    seed: int, heads: int = 6, kv_heads: int = 3, size: int = 13, value_size: int = 13
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the forest above, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, size), (kv_heads, size), (kv_heads, value_size))
    q, k, v = (
        torch.randn(NUM_TOKENS, *shape, generator=generator, dtype=torch.float64)
        for shape in shapes
    )
    return q, k, v


OPTIONS = [
    {},
    {"window": 4},
    {"scale": 0.7},
    {"softcap": 1.5},
    {"sinks": torch.linspace(-2, 3, 6, dtype=torch.float64)},
    {"softcap": 2.0, "window": 5, "sinks": torch.zeros(6, dtype=torch.float64), "scale": 1.3},
]


@pytest.mark.parametrize("implementation", ["auto", "torch"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("kv_heads", "value_size"), [(3, 13), (6, 7), (1, 13)])
def test_values_and_gradients_match_the_reference(
    implementation: str, options: dict, kv_heads: int, value_size: int
) -> None:
    segments = make_segments(LENGTHS, PARENTS)
    tensors = [x.requires_grad_() for x in inputs(0, kv_heads=kv_heads, value_size=value_size)]
    out = segment_attention(*tensors, segments, **options, implementation=implementation)
    expected = segment_attention_reference(*tensors, segments, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    grads = torch.autograd.grad(out, tensors, slope)
    for grad, truth in zip(grads, torch.autograd.grad(expected, tensors, slope), strict=True):
        torch.testing.assert_close(grad, truth, rtol=0, atol=1e-12)


def test_reference_matches_a_loop_over_tokens() -> None:
    q, k, v = inputs(1)
    segments = make_segments(LENGTHS, PARENTS)
    sinks = torch.linspace(-1, 1, 6, dtype=torch.float64)
    out = segment_attention_reference(
        q, k, v, segments, scale=0.4, softcap=3.0, window=6, sinks=sinks
    )
    visible = segments.visibility(6)
    for token in range(NUM_TOKENS):
        for head in range(6):
            keys, values = k[visible[token], head // 2], v[visible[token], head // 2]
            weights = (3.0 * torch.tanh(keys @ q[token, head] * 0.4 / 3.0)).exp()
            expected = weights @ values / (weights.sum() + sinks[head].exp())
            torch.testing.assert_close(out[token, head], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_packed_row_equals_separate_rows(options: dict) -> None:
    q, k, v = inputs(2)
    segments = make_segments(LENGTHS, PARENTS)
    packed = segment_attention(q, k, v, segments, **options)
    starts = segments.starts.tolist()
    for segment, length in enumerate(LENGTHS):
        path, above = [], segment
        while above >= 0:
            path = list(range(starts[above], starts[above] + LENGTHS[above])) + path
            above = PARENTS[above]
        alone = make_segments([len(path)], [-1])
        row = segment_attention(q[path], k[path], v[path], alone, **options)
        own = slice(starts[segment], starts[segment] + length)
        expected = row[len(path) - length :]
        torch.testing.assert_close(packed[own], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}])
def test_a_sibling_never_leaks(dtype: torch.dtype, options: dict) -> None:
    q, k, v = (x.to(dtype) for x in inputs(3))
    segments = make_segments(LENGTHS, PARENTS)
    sibling = slice(7, 12)  # segment 1
    before = segment_attention(q, k, v, segments, **options)
    for x in (q, k, v):
        x[sibling] = x[sibling] * -30 + 5
    after = segment_attention(q, k, v, segments, **options)
    others = torch.ones(NUM_TOKENS, dtype=torch.bool)
    others[sibling] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[sibling], after[sibling])


def test_a_sibling_gets_no_gradient() -> None:
    tensors = [x.requires_grad_() for x in inputs(4)]
    segments = make_segments(LENGTHS, PARENTS)
    out = segment_attention(*tensors, segments)
    grads = torch.autograd.grad(out[12:15].sum(), tensors)  # segment 3, a child of segment 0
    for grad in grads:
        assert torch.equal(grad[7:12], torch.zeros_like(grad[7:12]))
        assert torch.equal(grad[15:], torch.zeros_like(grad[15:]))


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("options", OPTIONS)
def test_low_precision_against_float64(dtype: torch.dtype, eps: float, options: dict) -> None:
    q, k, v = (x.to(dtype) for x in inputs(5))
    segments = make_segments(LENGTHS, PARENTS)
    out = segment_attention(q, k, v, segments, **options)
    truth = segment_attention_reference(q.double(), k.double(), v.double(), segments, **options)
    assert out.dtype == dtype
    assert (out.double() - truth).abs().max() <= eps * v.abs().max()


def test_empty_row() -> None:
    q = torch.zeros(0, 4, 8, requires_grad=True)
    kv = torch.zeros(0, 2, 8)
    out = segment_attention(q, kv, kv[..., :5], make_segments([], []))
    assert out.shape == (0, 4, 5)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[None], k, v), "shape"),
        (lambda q, k, v: (q, k[..., :5], v), "head size"),
        (lambda q, k, v: (q, k[:, :2], v), "heads of k"),
        (lambda q, k, v: (q[:, :4], k, v), "multiple"),
        (lambda q, k, v: (q[1:], k[1:], v[1:]), "tokens of segments"),
        (lambda q, k, v: (q, k.float(), v), "dtype"),
        (lambda q, k, v: (q, k.to("meta"), v), "one device"),
    ],
)
def test_bad_shapes_raise(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_attention(*change(*inputs(6)), make_segments(LENGTHS, PARENTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"softcap": 0.0}, "softcap"),
        ({"window": 0}, "window"),
        ({"implementation": "triton"}, "torch"),
        ({"implementation": "cuda"}, "implementation"),
    ],
)
def test_bad_options_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_attention(*inputs(7), make_segments(LENGTHS, PARENTS), **options)
