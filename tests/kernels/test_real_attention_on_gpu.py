"""Attention over forests of 64k tokens and long caches, against chunked float64; bits.

See gpu_sizes.py for a rehearsal on the CPU. N tokens, H heads, Hkv key-value heads, K head size, R
rows, C suffix columns.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrl_kernels import (
    Segments,
    decode_attention,
    linear_logps,
    make_segments,
    segment_attention,
    select_tokens,
)
from fastrl_kernels.decode_attention import decode_attention_reference
from fastrl_kernels.segment_conv import segment_conv, segment_conv_reference
from fastrl_kernels.segment_recurrence import segment_recurrence, segment_recurrence_reference
from fastrl_kernels.shared_rows import share_rows, take_rows
from tests.kernels.gpu_sizes import (
    DEVICE,
    MARKS,
    assert_same_on_every_run,
    make_generator,
    relative_error,
    sized,
)

pytestmark = MARKS
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCES = {BF16: 2e-2, FP16: 3e-3, FP32: 1e-4}
QUERY_CHUNK = 1024


def groups(num_groups: int, prompt: int, completion: int, num_completions: int) -> Segments:
    """Prompts with their completions."""
    lengths, parents = [], []
    for group in range(num_groups):
        root = len(lengths)
        lengths += [prompt, *(completion + (group + g) % 3 - 1 for g in range(num_completions))]
        parents += [-1, *[root] * num_completions]
    return make_segments(lengths, parents).to(DEVICE)


def tree(depth: int, length: int) -> Segments:
    """Every segment has two below it, down to a depth."""
    lengths, parents = [], []

    def grow(parent: int, level: int) -> None:
        lengths.append(length + len(lengths) % 5)
        parents.append(parent)
        own = len(lengths) - 1
        for _ in range(2 if level < depth else 0):
            grow(own, level + 1)

    grow(-1, 1)
    return make_segments(lengths, parents).to(DEVICE)


# 64k tokens each: eight groups, one group behind a prompt of 32k, a tree of 127 segments.
FORESTS: dict[str, Callable[[], Segments]] = {
    "groups": lambda: groups(*sized((8, 2048, 512, 12), (2, 21, 9, 2))),
    "long prompt": lambda: groups(*sized((1, 32768, 1024, 32), (1, 37, 5, 3))),
    "tree": lambda: tree(*sized((7, 514), (3, 7))),
}
CASES = [
    ("groups", BF16, 128), ("long prompt", BF16, 128), ("tree", BF16, 64), ("groups", FP16, 64),
    ("groups", BF16, 256), ("long prompt", FP32, 64),
]  # fmt: skip


def attention_inputs(segments: Segments, dtype: torch.dtype, size: int) -> list[Tensor]:
    """q, k, v, and the gradient of the output; 4 heads, 2 of them share keys."""
    generator = make_generator()
    return [
        torch.randn(segments.num_tokens, heads, size, generator=generator, device=DEVICE).to(dtype)
        for heads in (4, 2, 2, 4)
    ]


def chunked_truth(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, ends: Tensor) -> list[Tensor]:
    """Outputs and gradients in float64, from the rule of who sees whom, a head at a time."""
    results = [torch.zeros(x.shape, dtype=torch.float64, device=q.device) for x in (q, q, k, v)]
    token = torch.arange(len(q), device=q.device)
    for head in range(q.shape[1]):
        keys, values = (x[:, head // 2].double() for x in (k, v))
        for rows in token.split(QUERY_CHUNK):
            seen = (token <= rows[:, None]) & (rows[:, None] < ends)
            queries, slopes = (x[rows, head].double() for x in (q, grad))
            scores = (queries @ keys.T * q.shape[2] ** -0.5).masked_fill_(~seen, -torch.inf)
            probs = scores.softmax(-1)
            out = probs @ values
            inner = slopes @ values.T - (slopes * out).sum(-1, keepdim=True)
            inner.mul_(probs).mul_(q.shape[2] ** -0.5)
            results[0][rows, head] = out
            results[1][rows, head] = inner @ keys
            results[2][:, head // 2] += inner.T @ queries
            results[3][:, head // 2] += probs.T @ slopes
    return results


def attend(segments: Segments, tensors: list[Tensor], **options: int) -> list[Tensor]:
    """Outputs and gradients of the kernels."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = segment_attention(*leaves, segments, implementation="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


@pytest.mark.parametrize(("forest", "dtype", "size"), CASES)
def test_segment_attention_of_a_large_forest(forest, dtype, size):
    segments = FORESTS[forest]()
    tensors = attention_inputs(segments, dtype, size)
    found = attend(segments, tensors)
    for value, expected in zip(found, chunked_truth(*tensors, segments.ends), strict=True):
        assert relative_error(value, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_truth_is_that_of_the_reference(dtype):
    """Whoever checks the kernels is checked."""
    from fastrl_kernels.segment_attention import segment_attention_reference

    segments = groups(2, 40, 17, 3)
    tensors = attention_inputs(segments, dtype, 32)
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    out = segment_attention_reference(*leaves, segments)
    expected = [out, *torch.autograd.grad(out, leaves, tensors[3].double())]
    for value, other in zip(chunked_truth(*tensors, segments.ends), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("options", [{}, {"window": 100}])
def test_a_completion_has_the_same_bits_in_any_forest(size, options):
    """Alone behind its prompt, or with siblings, other groups and another place in the row."""
    prompt, completion = sized((700, 333), (21, 13))
    sizes = sized([(90, 50, 3), (333, 257, 4)], [(5, 3, 2), (9, 5, 2)])
    alone = make_segments([prompt, completion], [-1, 0]).to(DEVICE)
    lengths, parents = [sizes[0][0], *[sizes[0][1]] * sizes[0][2]], [-1, *[0] * sizes[0][2]]
    root = len(lengths)
    lengths += [prompt, sizes[1][1], completion, sizes[1][1]]
    parents += [-1, root, root, root]
    together = make_segments(lengths, parents).to(DEVICE)
    start = sum(lengths[:root])
    place = torch.cat([
        torch.arange(start, start + prompt), start + prompt + sizes[1][1] + torch.arange(completion)
    ]).to(DEVICE)  # fmt: skip
    tensors = attention_inputs(together, BF16, size)
    few = attend(alone, [x[place] for x in tensors], **options)
    many = attend(together, tensors, **options)
    for value, other in zip(few[:2], many[:2], strict=True):  # outputs, gradients of queries
        assert torch.equal(value, other[place])


def test_decode_attention_of_more_than_two_to_the_31_cached_numbers():
    num_rows, columns = sized((520, 4096), (5, 40))
    generator = make_generator()
    heads, size, length = 8, sized(128, 16), columns - 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    suffix_k, suffix_v = (
        torch.zeros(num_rows, heads, columns, size, dtype=BF16, device=DEVICE) for _ in range(2)
    )
    last = slice(num_rows - 3, None)
    suffix_k[last], suffix_v[last] = (normal(3, heads, columns, size) for _ in range(2))
    prefix_k, prefix_v = (normal(2, heads, 300, size).to(BF16) for _ in range(2))
    q = normal(num_rows, 2 * heads, size).to(BF16)
    row_groups = (torch.arange(num_rows, device=DEVICE) >= num_rows // 2).int()
    lengths = torch.tensor([300, 133], dtype=torch.int32, device=DEVICE)
    where = {"prefix_lengths": lengths, "suffix_length": length}
    out = decode_attention(
        q, prefix_k, prefix_v, suffix_k, suffix_v, row_groups=row_groups, **where,
        implementation="triton",
    )  # fmt: skip
    wide = [x.double() for x in (q[last], prefix_k, prefix_v, suffix_k[last], suffix_v[last])]
    truth = decode_attention_reference(*wide, row_groups=row_groups[last], **where)
    assert relative_error(out[last], truth) < 1e-2


def shared_rows_run() -> list[Tensor]:
    """Rows that many take, as the states of a prompt are."""
    num_rows, width = sized((4096, 1024), (7, 5))
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-1, num_rows // 3, (3 * num_rows,), generator=generator).tolist()
    x = torch.randn(num_rows, width, generator=generator).to(DEVICE, BF16).requires_grad_()
    out = take_rows(x, share_rows(index, torch.device(DEVICE)))
    slopes = torch.randn(out.shape, generator=generator).to(DEVICE, BF16)
    return [out.detach(), *torch.autograd.grad(out, x, slopes)]


def conv_run() -> list[Tensor]:
    """A causal convolution of four rows, depthwise."""
    segments = groups(*sized((4, 600, 100, 8), (2, 5, 3, 2)))
    generator = make_generator()
    x = torch.randn(segments.num_tokens, 64, generator=generator, device=DEVICE).requires_grad_()
    weight = torch.randn(64, 1, 4, generator=generator, device=DEVICE)

    def conv(rows: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(rows.T[None], (3, 0))
        return sum(
            padded[..., i : i + len(rows)] * weight[:, 0, i : i + 1] for i in range(4)
        )[0].T  # fmt: skip

    out = segment_conv(x, conv, segments, kernel_size=4)
    host = x.detach().double().cpu()
    weight = weight.double().cpu()
    expected = segment_conv_reference(host, conv, segments.host, kernel_size=4)
    assert relative_error(out.detach().cpu(), expected) < 1e-5
    return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]


def recurrence_run() -> list[Tensor]:
    """A decaying sum, which a completion starts from that of its prompt."""
    segments = groups(*sized((4, 300, 60, 8), (2, 5, 3, 2)))
    x = torch.randn(segments.num_tokens, 64, generator=make_generator(), device=DEVICE)

    def rule(inputs: list[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        (rows,) = inputs
        state = torch.zeros_like(rows[:, 0]) if state is None else state
        outs = []
        for row in rows.unbind(1):
            # Rows of zeros, the padding, leave a state as it is.
            keep = torch.where((row == 0).all(-1, keepdim=True), 1.0, 0.9)
            state = keep * state + row
            outs.append(state)
        return torch.stack(outs, 1), state

    x.requires_grad_()
    out = segment_recurrence([x], rule, segments)
    expected = segment_recurrence_reference([x.detach().double().cpu()], rule, segments.host)
    assert relative_error(out.detach().cpu(), expected) < 1e-5
    return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]


def selection_run() -> list[Tensor]:
    """Scores with ties."""
    scores = torch.randn(sized(300_001, 101), generator=make_generator(), device=DEVICE).round()
    return [select_tokens(scores, ratio=0.3, implementation="triton")]


def attention_run() -> list[Tensor]:
    """Keys of a prompt are shared out to many programs, whose sums are added up."""
    segments = groups(*sized((4, 1024, 256, 8), (2, 21, 9, 2)))
    return attend(segments, attention_inputs(segments, BF16, 64))


def decode_run() -> list[Tensor]:
    """A prefix that many rows share."""
    rows, prefix = sized((64, 4096), (5, 40))
    generator = make_generator()
    shapes = [(rows, 8, 64), *[(1, 2, prefix, 64)] * 2, *[(rows, 2, prefix // 2, 64)] * 2]
    tensors = [torch.randn(x, generator=generator, device=DEVICE).to(BF16) for x in shapes]
    return [
        decode_attention(
            *tensors, row_groups=torch.zeros(rows, dtype=torch.int32, device=DEVICE),
            prefix_lengths=torch.tensor([prefix - 1], dtype=torch.int32, device=DEVICE),
            suffix_length=prefix // 2 - 1, implementation="triton",
        )
    ]  # fmt: skip


def adapter_run() -> list[Tensor]:
    """A head with bias, adapter and softcap."""
    from fastrl_kernels import LMHead

    S, D, V = sized((515, 256, 5003), (17, 19, 67))
    generator = make_generator()
    shapes = [(S, D), (V, D), (V,), (8, D), (V, 8)]
    tensors = [torch.randn(x, generator=generator, device=DEVICE) / 8 for x in shapes]
    hidden, *parts = (x.to(BF16).requires_grad_() for x in tensors)
    target_ids = torch.arange(S, device=DEVICE)
    head = LMHead(*parts, softcap=30.0)
    out = linear_logps(hidden, head, target_ids, implementation="triton")
    return [out.logps.detach(), *torch.autograd.grad(out.logps.sum(), [hidden, *parts])]


@pytest.mark.parametrize(
    "run",
    [
        attention_run, decode_run, selection_run, adapter_run, shared_rows_run, conv_run,
        recurrence_run,
    ],
)  # fmt: skip
def test_runs_give_the_same_bits(run):
    assert_same_on_every_run(run)


def test_shared_rows_add_up_what_comes_back():
    found = shared_rows_run()[1]
    num_rows = len(found)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-1, num_rows // 3, (3 * num_rows,), generator=generator)
    torch.randn(found.shape, generator=generator)
    slopes = torch.randn(3 * num_rows, found.shape[1], generator=generator).to(BF16).double()
    expected = torch.zeros(found.shape, dtype=torch.float64)
    taken = index >= 0
    expected.index_add_(0, index[taken], slopes[taken])
    assert relative_error(found.cpu(), expected) < 4e-3
