"""Attention by calls of flash attention: which rows they cover, and what the kernels are handed.

N packed tokens, H heads, Hkv key-value heads, K head size.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastrl_kernels import Segments, make_segments, segment_attention
from fastrl_kernels.segment_attention import flash, segment_attention_reference, varlen
from fastrl_kernels.segment_attention.flash import Flash, Options, Sequences
from fastrl_kernels.segment_attention.varlen import segment_attention_varlen
from tests.kernels.test_segment_attention_fallbacks import (
    assert_equal_to_reference,
    forests,
    random_inputs,
    run,
)


def test_a_window_within_segments_needs_no_other_mask_above_them() -> None:
    segments = make_segments([40, 3, 4, 2, 57], [-1, -1, 1, 1, -1])  # shared paths of 7 and 5
    for window in (7, 11, 100):
        assert_equal_to_reference("varlen", random_inputs(106), segments, window=window)
    with pytest.raises(ValueError, match="at least 7 tokens"):
        segment_attention(*random_inputs(106), segments, window=6, implementation="varlen")


@settings(max_examples=100, deadline=None)
@given(forests())
def test_the_calls_cover_each_visible_pair_once(segments: Segments) -> None:
    plan = varlen.make_plan(segments)
    times = torch.zeros(segments.num_tokens, segments.num_tokens, dtype=torch.int64)
    rows = torch.arange(segments.num_tokens)
    for call in (plan.own, *plan.levels):
        queries, keys = rows[call.queries], rows[call.keys]
        for query, key in call.sequences.slices():
            assert len(queries[query]) > 0 < len(keys[key])
            seen = times.new_ones(len(queries[query]), len(keys[key]))
            times[queries[query][:, None], keys[key]] += (
                seen.tril() if call.sequences.is_causal else seen
            )
        ends = (call.sequences.query_ends[-1], call.sequences.key_ends[-1])
        assert ends == (len(queries), len(keys))
    assert torch.equal(times, segments.visibility().long())


def test_a_group_takes_two_calls_and_no_copy_of_the_prompt() -> None:
    plan = varlen.make_plan(make_segments([50, 7, 0, 9], [-1, 0, 0, 0]))
    (level,) = plan.levels
    assert (level.queries, level.keys) == (slice(50, 66), slice(0, 50))
    assert level.sequences.query_lengths == [16]


def check_inputs(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> None:
    """What the C++ of flash-attn and of PyTorch checks, or takes for granted."""
    assert q.dtype == k.dtype == v.dtype
    assert {x.stride(-1) for x in (q, k, v)} == {1}
    longest = sequences.longest
    for rows, ends, lengths, bound in (
        (q, sequences.query_ends, sequences.query_lengths, longest[0]),
        (k, sequences.key_ends, sequences.key_lengths, longest[1]),
    ):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert ends.diff().tolist() == lengths
        assert (ends[0], ends[-1]) == (0, rows.shape[0])
        assert min(lengths) > 0
        assert max(lengths) <= bound
    assert not sequences.is_causal or sequences.query_lengths == sequences.key_lengths


def rounding(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor]:
    check_inputs(q, k, v, sequences)
    out, lse = flash.PLAIN.forward(q, k, v, sequences, options)
    return out.to(q.dtype), lse


def rounding_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_inputs(q, k, v, sequences)
    assert q.dtype == out.dtype == grad.dtype
    assert out.shape == grad.shape == q.shape
    assert (lse.dtype, lse.shape, lse.is_contiguous()) == (torch.float32, (6, q.shape[0]), True)
    dq, dk, dv = flash.PLAIN.backward(grad, q, k, v, out, lse, sequences, options)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_in_half_precision_as_the_kernels_return_them(
    dtype: torch.dtype, heads_first: bool
) -> None:
    """The bound of the library: twice PyTorch's own error, three times for gradients."""
    segments = make_segments([65, 30, 0, 41, 7, 1, 50], [-1, 0, 0, 0, 3, 3, -1])
    tensors = random_inputs(segments.num_tokens, dtype)
    sinks = torch.linspace(-1, 2, 6)
    if heads_first:
        tensors = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    by_parts = functools.partial(
        segment_attention_varlen, scale=0.4, flash=Flash("rounding", rounding, rounding_gradients)
    )
    at_once = functools.partial(segment_attention_reference, scale=0.4)
    found = run(by_parts, tensors, segments, sinks=sinks)
    peer = run(at_once, tensors, segments, sinks=sinks)
    truth = run(at_once, [x.double() for x in tensors], segments, sinks=sinks.double())
    for factor, x, y, z in zip((2, 3, 3, 3, 3), found, peer, truth, strict=True):
        assert x.dtype == y.dtype
        assert (x - z).norm() <= factor * (y - z).norm()


def test_pytorch_takes_the_arguments_of_its_own_kernels() -> None:
    """On the meta device, which checks the call and gives the shapes, and computes nothing."""
    plan = varlen.make_plan(make_segments([30, 9, 12, 40, 3], [-1, 0, 0, -1, 3]).to("meta"))
    q, k, v = (
        torch.empty(94, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (6, 2, 2)
    )
    for window in (None, 50):
        options = Options(0.125, window, None)
        out, lse = varlen._forward(q, k, v, None, plan, options, flash.PYTORCH)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        assert lse.shape == (6, 94)
        gradients = varlen._backward(out, q, k, v, out, lse, plan, options, flash.PYTORCH)
        for gradient, x in zip(gradients, (q, k, v), strict=True):
            assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)


def test_log_sum_exp_of_another_shape_is_refused() -> None:
    """Older releases of PyTorch and flash-attn had one of (sequences, heads, longest)."""

    def padded(*args: object) -> tuple[Tensor, Tensor]:
        out, lse = flash.PLAIN.forward(*args)
        return out, lse[None]

    segments = make_segments([5, 3], [-1, 0])
    old = Flash("flash-attn 2.5", padded, flash.PLAIN.backward)
    with pytest.raises(ValueError, match=r"flash-attn 2.5 to return .* \(6, 8\), got \(1, 6, 8\)"):
        segment_attention_varlen(*random_inputs(8), segments, scale=1.0, flash=old)


@pytest.mark.parametrize("before", [False, True])
def test_the_switch_for_deterministic_kernels_is_put_back(before: bool) -> None:
    def fail() -> None:
        with flash.deterministic_algorithms():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError

    torch.use_deterministic_algorithms(before, warn_only=True)
    try:
        with pytest.raises(KeyError):
            fail()
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
