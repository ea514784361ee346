"""What FlexAttention is told to skip, and what makes it compile again.

N packed tokens, L blocks.
"""

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastrl_kernels import Segments, make_segments
from fastrl_kernels.segment_attention import flex, segment_attention_reference
from tests.kernels.test_segment_attention_fallbacks import forests, random_inputs, run


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """(L, L) bool: the blocks of keys in each list."""
    blocks = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        blocks[row, indices[0, 0, row, :count].long()] = True
    return blocks


def seen(segments: Segments, window: int | None, size: int) -> tuple[Tensor, Tensor]:
    """(L, L) bool by brute force: is any pair of two blocks visible, and are all of them."""
    visible = segments.visibility(window)
    blocks = [block.split(size, dim=1) for block in visible.split(size)]
    return tuple(
        torch.tensor([[bool(test(block)) for block in row] for row in blocks])
        for test in (torch.any, torch.all)
    )


@settings(max_examples=150, deadline=None)
@given(forests(), st.sampled_from([None, 1, 3, 6]), st.integers(1, 5))
def test_no_visible_pair_is_skipped_and_no_hidden_one_goes_unmasked(
    segments: Segments, window: int | None, size: int
) -> None:
    mask = flex.make_block_mask(segments, window, size)
    masked = listed(mask.kv_num_blocks, mask.kv_indices)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    any_seen, all_seen = seen(segments, window, size)
    assert not (masked & whole).any()
    assert not (any_seen & ~masked & ~whole).any()
    assert not (whole & ~all_seen).any()


@pytest.mark.parametrize("window", [None, 40])
def test_lists_are_those_of_pytorch_for_a_prompt_with_completions(window: int | None) -> None:
    """PyTorch's come from all pairs of tokens; ours from the ranges in blocks."""
    segments = make_segments([100, 33, 16, 60], [-1, 0, 0, 0])
    num_tokens, size = segments.num_tokens, 16
    mask = flex.make_block_mask(segments, window, size)
    exact = create_block_mask(
        mask.mask_mod, None, None, num_tokens, num_tokens, device="cpu", BLOCK_SIZE=size
    )
    needed = listed(exact.kv_num_blocks, exact.kv_indices)
    needed |= listed(exact.full_kv_num_blocks, exact.full_kv_indices)
    ours = listed(mask.kv_num_blocks, mask.kv_indices)
    ours |= listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    if window is None:
        assert torch.equal(ours, needed)
        assert torch.equal(
            listed(mask.full_kv_num_blocks, mask.full_kv_indices),
            listed(exact.full_kv_num_blocks, exact.full_kv_indices),
        )
    else:  # positions repeat among siblings, so a range of them says less
        assert not (needed & ~ours).any()
        assert ours.sum() <= 1.3 * needed.sum()


def test_any_length_scale_and_softcap_run_in_one_compilation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, but for the last stage: rows of at least two blocks, with dynamic lengths."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *x: None)
    monkeypatch.setattr(flex, "_eager_attention", compiled)

    def attention(*args: Any, scale: float, softcap: float, window: int | None) -> Tensor:
        *tensors, segments = args
        mask = flex.block_mask_of(segments, window)
        return flex.attend(*tensors, mask, scale, softcap, None)

    cases = [
        ([270, 50, 40, 31, 128], [-1, 0, 0, -1, 3], 0.4, 30.0, None),
        ([280, 70], [-1, 0], 0.3, 2.0, None),
        ([130, 3, 1], [-1, 0, 0], 13**-0.5, 3.0, 19),
    ]
    counts = []
    for lengths, parents, scale, softcap, window in cases:
        segments = make_segments(lengths, parents)
        tensors = random_inputs(segments.num_tokens)
        options = {"scale": scale, "softcap": softcap, "window": window}
        found = run(attention, tensors, segments, **options)
        truth = run(segment_attention_reference, tensors, segments, **options)
        for value, expected in zip(found, truth, strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
def test_compiled_code_skips_the_blocks_that_are_not_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch's kernel for CPUs, forward only; it goes by the lists as the one for GPUs does."""
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    monkeypatch.setattr(flex, "_eager_attention", compiled)
    options: dict[str, Any] = {"scale": 0.3, "softcap": 3.0, "window": 200}
    for lengths in ([270, 50, 40, 31, 128], [300, 70, 0, 90, 3]):
        segments = make_segments(lengths, [-1, 0, 0, -1, 3])
        q, k, v = random_inputs(segments.num_tokens, torch.float32)
        with torch.no_grad():
            out = flex.segment_attention_flex(q, k, v, segments, **options)
        truth = segment_attention_reference(q.double(), k.double(), v.double(), segments, **options)
        assert (out.double() - truth).abs().max() <= 1e-5
    mask = flex.block_mask_of(segments, 200)
    mask.kv_num_blocks.clamp_(max=1)  # all masked blocks but the first go missing
    with torch.no_grad():
        fewer = flex.segment_attention_flex(q, k, v, segments, **options)
    assert (fewer - out).abs().max() > 0.1
    torch._dynamo.reset()
