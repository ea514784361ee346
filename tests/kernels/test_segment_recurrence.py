"""Convolution and recurrence along paths against every path in full, in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fastrl_kernels import Segments, make_segments
from fastrl_kernels.segment_conv import segment_conv, segment_conv_reference
from fastrl_kernels.segment_recurrence import segment_recurrence, segment_recurrence_reference
from fastrl_kernels.shared_rows import share_rows, take_rows

FORESTS = [
    ([9], [-1]),
    ([1, 1], [-1, -1]),
    ([7, 5, 0, 3, 1], [-1, 0, 0, 0, 0]),
    ([0, 4, 0, 0, 2, 3], [-1, 0, 1, 2, 3, -1]),
    ([2, 1, 0, 3, 1, 5, 0, 0, 4, 1, 2, 3, 6], [-1, 0, 1, 2, 2, 1, 0, 6, 7, 7, 9, 9, -1]),
    ([3, 300, 4, 5, 260, 2], [-1, 0, 1, 0, 0, 4]),  # lengths too different for one batch
]
NUM_CHANNELS, NUM_HEADS, KEY_SIZE, VALUE_SIZE = 5, 2, 3, 4


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def causal_conv(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """(T, D) rows to (T, D) sums over the taps of weight (D, kernel size), through a sine."""

    def conv(rows: Tensor) -> Tensor:
        padded = functional.pad(rows, (0, 0, weight.shape[1] - 1, 0))
        return (padded.unfold(0, weight.shape[1], 1) * weight).sum(-1).sin()

    return conv


def gated_delta_rule(inputs: Sequence[Tensor], state: Tensor | None, /) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet (arXiv:2412.06464, equation 10), one token after another.

    k (B, T, H, K), v (B, T, H, Kv), g and beta (B, T, H); the state is (B, H, K, Kv).
    """
    k, v, g, beta = inputs
    if state is None:
        state = k.new_zeros(len(k), k.shape[2], k.shape[3], v.shape[3])
    outs = []
    for t in range(k.shape[1]):
        key, decayed = k[:, t, :, :, None], state * g[:, t, :, None, None].exp()
        known = (decayed * key).sum(-2, keepdim=True)
        state = decayed + key * beta[:, t, :, None, None] * (v[:, t, :, None] - known)
        outs.append((state * key).sum(-2))
    return torch.stack(outs, 1), state


def delta_inputs(num_tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = ((NUM_HEADS, KEY_SIZE), (NUM_HEADS, VALUE_SIZE), (NUM_HEADS,), (NUM_HEADS,))
    k, v, g, beta = (random(num_tokens, *s, seed=seed + i) for i, s in enumerate(sizes))
    tensors = (functional.normalize(k, dim=-1), v, -g.exp(), beta.sigmoid())
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def value_and_gradients(out: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, list(tensors), slope)]


def assert_conv_is_exact(segments: Segments, kernel_size: int) -> None:
    x = random(segments.num_tokens, NUM_CHANNELS, seed=0)
    weight = random(NUM_CHANNELS, kernel_size, seed=1)
    results = [
        value_and_gradients(
            along(x, causal_conv(weight), segments, kernel_size=kernel_size), (x, weight)
        )
        for along in (segment_conv, segment_conv_reference)
    ]
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def assert_recurrence_is_exact(segments: Segments) -> None:
    inputs = delta_inputs(segments.num_tokens, seed=2)
    results = [
        value_and_gradients(along(inputs, gated_delta_rule, segments), inputs)
        for along in (segment_recurrence, segment_recurrence_reference)
    ]
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 2, 4, 7])
@pytest.mark.parametrize("forest", FORESTS)
def test_convolution_and_its_gradients_match_the_reference(forest: Any, kernel_size: int) -> None:
    assert_conv_is_exact(make_segments(*forest), kernel_size)


@pytest.mark.parametrize("forest", FORESTS)
def test_recurrence_and_its_gradients_match_the_reference(forest: Any) -> None:
    assert_recurrence_is_exact(make_segments(*forest))


@st.composite
def forests(draw: st.DrawFn) -> Segments:
    lengths, parents, path = [], [], []
    for segment in range(draw(st.integers(1, 12))):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        lengths.append(draw(st.integers(0, 5)) + (segment == 0))
        path.append(segment)
    return make_segments(lengths, parents)


@settings(max_examples=40, deadline=None)
@given(forests(), st.integers(1, 5))
def test_any_forest(segments: Segments, kernel_size: int) -> None:
    assert_conv_is_exact(segments, kernel_size)
    assert_recurrence_is_exact(segments)


def test_the_reference_is_the_whole_path_alone() -> None:
    segments = make_segments([3, 2, 0, 4], [-1, 0, 0, 2])
    inputs = delta_inputs(9, seed=5)
    out = segment_recurrence_reference(inputs, gated_delta_rule, segments)
    path = [0, 1, 2, 5, 6, 7, 8]
    alone, _ = gated_delta_rule([x[path][None] for x in inputs], None)
    assert torch.equal(out[5:], alone[0, 3:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_sibling_is_neither_seen_nor_waited_for(dtype: torch.dtype) -> None:
    """Not in its values, and not in its length: padding leaves states and outputs as they are."""
    parents = [-1, 0, 0, 0]
    weight = random(NUM_CHANNELS, 4, seed=1, dtype=dtype)

    def run(lengths: list[int], seed: int) -> list[Tensor]:
        segments = make_segments(lengths, parents)
        ours = [0, 1, 2, 3, 4, 5, 6, *range(segments.num_tokens - 3, segments.num_tokens)]
        sources = [
            *delta_inputs(10, seed=3, dtype=dtype), random(10, NUM_CHANNELS, seed=9, dtype=dtype)
        ]  # fmt: skip
        tensors = [
            random(segments.num_tokens, *x.shape[1:], seed=seed, dtype=dtype)
            .detach().tanh().index_copy(0, torch.tensor(ours), x.detach()).requires_grad_()
            for x in sources
        ]  # fmt: skip
        outs = (
            segment_recurrence(tensors[:4], gated_delta_rule, segments),
            segment_conv(tensors[4], causal_conv(weight), segments, kernel_size=4),
        )
        grads = torch.autograd.grad([out[ours].float().cos().sum() for out in outs], tensors)
        return [x[ours] for x in (*outs, *grads)]

    first = run([5, 2, 6, 3], seed=20)
    for others in (run([5, 2, 6, 3], seed=40), run([5, 2, 0, 3], seed=60)):
        for own, same in zip(first, others, strict=True):
            assert torch.equal(own, same)


def test_gradients_of_shared_rows_are_summed_in_float32() -> None:
    """One large gradient and many that bfloat16 would lose beside it, one at a time."""
    index = [1] * 257 + [-1, 0]
    x = random(3, 1, seed=0, dtype=torch.bfloat16)
    taken = take_rows(x, share_rows(index, x.device))
    assert torch.equal(taken[:257], x[1:2].expand(257, 1))
    assert taken[257] == 0
    slope = torch.cat([torch.full((1, 1), 256.0), torch.full((258, 1), 0.5)]).to(torch.bfloat16)
    (grad,) = torch.autograd.grad(taken, x, slope)
    assert grad[:, 0].tolist() == [0.5, 256 + 128, 0]


def test_wrong_shapes_are_refused() -> None:
    segments = make_segments([3, 2], [-1, 0])
    with pytest.raises(ValueError, match="drop the batch dimension"):
        segment_conv(torch.zeros(1, 5, 2), lambda x: x, segments, kernel_size=2)
    with pytest.raises(ValueError, match="positive number of rows, got 0"):
        segment_conv(torch.zeros(5, 2), lambda x: x, segments, kernel_size=0)
    with pytest.raises(ValueError, match="must hold the 5 tokens"):
        segment_recurrence([torch.zeros(5, 2), torch.zeros(4)], gated_delta_rule, segments)
