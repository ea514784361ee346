"""The kernels on an NVIDIA GPU at real sizes; needs torch, triton and pytest there, nothing else.

S tokens, D hidden, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import (
    LMHead,
    Segments,
    explain,
    linear_logps,
    make_segments,
    policy_loss,
    segment_attention,
    select_tokens,
    selected_logps,
    token_loss,
)
from fastrl_kernels.objectives import Objective, Regulariser, clipped_ratio, k3
from fastrl_kernels.policy_loss import policy_loss_reference
from fastrl_kernels.segment_attention import flash, segment_attention_reference
from fastrl_kernels.segment_attention.varlen import segment_attention_varlen
from fastrl_kernels.selected_logps import selected_logps_reference
from fastrl_kernels.token_loss import token_loss_reference
from fastrl_kernels.token_selection import select_tokens_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
HALF = [torch.bfloat16, torch.float16]
GRPO = Objective(clipped_ratio, (0.2, 0.28))
ENGINES = [("one_pass", "gather"), ("one_pass", "cublas"), ("min_memory", "auto")]


def make_case(
    num_tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, *, extras: bool = False
) -> tuple[Tensor, LMHead, dict[str, Tensor]]:
    """Peaked logits with the targets likely, and everything that a policy loss takes."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    weight = normal(vocab_size, hidden_size) / hidden_size**0.5
    target_ids = torch.randint(vocab_size, (num_tokens,), generator=generator, device="cuda")
    hidden = 8 * weight[target_ids] + 0.3 * normal(num_tokens, hidden_size)
    head = LMHead(weight.to(dtype).requires_grad_())
    if extras:
        head = head._replace(
            bias=normal(vocab_size).to(dtype).requires_grad_(),
            lora_a=(normal(8, hidden_size) / hidden_size**0.5).to(dtype).requires_grad_(),
            lora_b=normal(vocab_size, 8).to(dtype).requires_grad_(),
            softcap=30.0,
            vocab_size=vocab_size - 3,
        )
        target_ids.clamp_(max=vocab_size - 4)
    target_ids[::17] = -1
    hidden[::17] = float("nan")
    logps = -torch.rand(num_tokens, generator=generator, device="cuda")
    tensors = {
        "target_ids": target_ids,
        "advantages": normal(num_tokens) * (torch.arange(num_tokens, device="cuda") % 3 > 0),
        "token_weights": torch.full((num_tokens,), 1 / num_tokens, device="cuda"),
        "old_logps": logps,
        "ref_logps": logps - 0.1,
    }
    return hidden.to(dtype).requires_grad_(), head, tensors


def leaves(hidden: Tensor, head: LMHead) -> list[Tensor]:
    return [x for x in (hidden, *head[:4]) if isinstance(x, Tensor)]


def copied(hidden: Tensor, head: LMHead, dtype: torch.dtype) -> tuple[Tensor, LMHead]:
    """For the reference, which multiplies what ignored rows hold by zero."""
    parts = [
        x.detach().to(dtype).nan_to_num().requires_grad_() if isinstance(x, Tensor) else x
        for x in (hidden, *head)
    ]
    return parts[0], LMHead._make(parts[1:])  # type: ignore[return-value]


# Kernels take a second or two to compile, so these cases leave out what others prove. Heads without
# extras have the other dtypes at real sizes in test_real_heads_on_gpu.py, attention without options
# in test_real_attention_on_gpu.py.
HEADS = [
    *((dtype, *engine, True) for engine in ENGINES for dtype in (*HALF, torch.float32)),
    (torch.bfloat16, *ENGINES[0], False),
    (torch.float32, *ENGINES[1], False),
    (torch.float16, *ENGINES[2], False),
]


@pytest.mark.parametrize(
    ("dtype", "engine", "products", "extras"),
    # Float16 gradients need the units of the gathered products.
    [case for case in HEADS if (case[0], case[2]) != (torch.float16, "cublas")],
)
def test_policy_loss_against_float64(dtype, engine, products, extras):
    hidden, head, tensors = make_case(515, 5003, 200, dtype, extras=extras)
    objective = Objective(clipped_ratio, (0.2, 0.28), (Regulariser(k3, 0.04),))
    settings = {"objective": objective, "entropy_coef": 0.01}
    wide, wide_head = copied(hidden, head, torch.float64)
    truth = policy_loss_reference(wide, wide_head, **tensors, **settings)
    expected = torch.autograd.grad(truth.loss, leaves(wide, wide_head))
    out = policy_loss(
        hidden, head, **tensors, **settings, engine=engine, products=products,
        implementation="triton", workspace_mb=24,
    )  # fmt: skip
    got = torch.autograd.grad(out.loss, leaves(hidden, head))
    for name in ("logps", "entropies"):
        assert (getattr(out, name).double() - getattr(truth, name)).abs().max() <= 1e-4
    assert torch.equal(out.clipped, truth.clipped)
    same, same_head = copied(hidden, head, dtype)
    naive = policy_loss_reference(same, same_head, **tensors, **settings)
    pytorch = torch.autograd.grad(naive.loss, leaves(same, same_head))
    for grad, peer, exact in zip(got, pytorch, expected, strict=True):
        error, peer_error = (grad.double() - exact).norm(), (peer.double() - exact).norm()
        unit = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        assert error <= 3 * peer_error + unit * exact.norm()


@pytest.mark.parametrize(("engine", "products"), ENGINES)
def test_twenty_runs_give_the_same_bits(engine, products):
    hidden, head, tensors = make_case(1031, 32003, 512, torch.bfloat16)
    del tensors["ref_logps"]
    first: list[Tensor] = []
    for _ in range(20):
        out = policy_loss(
            hidden, head, **tensors, objective=GRPO, engine=engine, products=products,
            workspace_mb=2048 if engine == "one_pass" else 64,
        )  # fmt: skip
        found = [out.loss, out.logps, *torch.autograd.grad(out.loss, leaves(hidden, head))]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_nothing_waits_for_the_device_and_a_graph_captures_it():
    hidden, head, tensors = make_case(700, 32000, 256, torch.bfloat16)
    del tensors["ref_logps"]

    def step() -> list[Tensor]:
        out = policy_loss(hidden, head, **tensors, objective=GRPO, workspace_mb=512)
        again = linear_logps(hidden, head, tensors["target_ids"])
        loss = out.loss + again.logps.sum()
        return [loss, *torch.autograd.grad(loss, leaves(hidden, head))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize(("engine", "workspace_mb"), [("one_pass", 2048), ("min_memory", 256)])
def test_memory_stays_inside_the_plan(engine, workspace_mb):
    hidden, head, tensors = make_case(8192, 151936, 1024, torch.bfloat16)
    del tensors["ref_logps"]
    plan = explain(hidden, head, engine=engine, workspace_mb=workspace_mb)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    policy_loss(
        hidden, head, **tensors, objective=GRPO, engine=engine, workspace_mb=workspace_mb
    ).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before - plan.gradient_bytes
    assert extra <= workspace_mb * 2**20 + 64 * 8192


def test_offsets_beyond_two_to_the_31():
    num_tokens, vocab_size = 16400, 151936
    logits = torch.zeros(num_tokens, vocab_size, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.linspace(-20, 20, vocab_size, device="cuda")
    logits.requires_grad_()
    target_ids = torch.full((num_tokens,), -1, device="cuda")
    target_ids[-1] = 77
    out = selected_logps(logits, target_ids, inplace_backward=False)
    expected = selected_logps_reference(logits[-1:].double(), target_ids[-1:])
    torch.testing.assert_close(out.logps[-1:].double(), expected.logps, rtol=0, atol=1e-4)
    (grad,) = torch.autograd.grad(out.logps.sum(), logits)
    (exact,) = torch.autograd.grad(expected.logps.sum(), logits)
    torch.testing.assert_close(grad[-1].float(), exact[-1].float(), rtol=1e-2, atol=1e-6)
    assert not grad[:-1].any()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_selected_logps_and_token_loss_against_float64(dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    logits = (5 * torch.randn(515, 32003, generator=generator, device="cuda")).to(dtype)
    logits.requires_grad_()
    target_ids = torch.randint(32003, (515,), generator=generator, device="cuda")
    out, truth = (
        selected_logps(logits, target_ids),
        selected_logps_reference(logits.double(), target_ids),
    )
    for name in ("logps", "entropies", "lse", "sum_p2", "sum_p3"):
        torch.testing.assert_close(
            getattr(out, name).double(), getattr(truth, name), rtol=0, atol=1e-4
        )
    weights = torch.rand(515, generator=generator, device="cuda")
    arguments = (torch.randn(515, generator=generator, device="cuda"), weights)
    settings = {"objective": GRPO, "old_logps": out.logps.detach() + 0.1, "entropy_coef": 0.01}
    got = token_loss(out.logps, out.entropies, *arguments, **settings)
    expected = token_loss_reference(out.logps, out.entropies, *arguments, **settings)
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other.to(value.dtype), rtol=1e-5, atol=1e-6)


def test_a_row_alone_and_in_a_batch_and_the_ratio_on_policy():
    hidden, head, tensors = make_case(700, 32003, 256, torch.bfloat16)
    with torch.no_grad():
        together = linear_logps(hidden, head, tensors["target_ids"])
        for row in (1, 128, 699):
            alone = linear_logps(hidden[row : row + 1], head, tensors["target_ids"][row : row + 1])
            assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
    tensors["old_logps"] = together.logps
    del tensors["ref_logps"]
    out = policy_loss(
        hidden,
        head,
        **tensors,
        objective=GRPO,
        engine="one_pass",
        products="gather",
        workspace_mb=512,
    )
    assert torch.equal(out.logps, together.logps)


def attention_inputs(dtype: torch.dtype, size: int) -> tuple[list[Tensor], Segments]:
    """q, k, v of two groups, one of them two levels deep."""
    parents = [-1, 0, 0, 2, -1, 4]
    segments = make_segments([300, 70, 1, 129, 257, 64], parents).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(segments.num_tokens, heads, size, generator=generator, device="cuda").to(dtype)
        for heads in (6, 2, 2)
    ]
    return tensors, segments


def attention_and_gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], segments: Segments, **options: Any
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].detach().requires_grad_()
        leaves.append(options["sinks"])
    out = function(*leaves[:3], segments, **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def assert_attention_is_right(
    function: Callable[..., Tensor], tensors: list[Tensor], segments: Segments, **options: Any
) -> None:
    """Values and gradients against float64, and the same bits twice."""
    found = attention_and_gradients(function, tensors, segments, **options)
    again = attention_and_gradients(function, tensors, segments, **options)
    wide = [x.double() for x in tensors]
    truth = attention_and_gradients(segment_attention_reference, wide, segments, **options)
    dtype = tensors[0].dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    for value, repeated, expected in zip(found, again, truth, strict=True):
        assert (value.double() - expected).norm() / expected.norm() < tolerance
        assert torch.equal(value, repeated)


CAPPED = {"window": 100, "softcap": 20.0}
ATTENTION = [
    *((dtype, size, CAPPED) for dtype in (*HALF, torch.float32) for size in (64, 128, 256)),
    *((dtype, size, {}) for dtype in (HALF[1], torch.float32) for size in (128, 256)),
]


@pytest.mark.parametrize(("dtype", "size", "options"), ATTENTION)
def test_segment_attention(dtype: torch.dtype, size: int, options: dict) -> None:
    by_kernels = functools.partial(segment_attention, implementation="triton")
    assert_attention_is_right(by_kernels, *attention_inputs(dtype, size), **options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("package", ["torch", "flash_attn"])
def test_segment_attention_by_varlen_flash_attention(
    dtype: torch.dtype, size: int, package: str
) -> None:
    pytest.importorskip(package)
    kernels = flash.PYTORCH if package == "torch" else flash.flash_attn_kernels()
    by_flash = functools.partial(segment_attention_varlen, flash=kernels)
    inputs = attention_inputs(dtype, size)
    sinks = torch.linspace(-1, 2, 6, device="cuda")
    assert_attention_is_right(by_flash, *inputs, scale=0.1)
    assert_attention_is_right(by_flash, *inputs, scale=0.3, window=600, sinks=sinks)
    if package == "flash_attn":
        assert_attention_is_right(by_flash, *inputs, scale=0.3, softcap=20.0)


SINKS = tuple(torch.linspace(-1, 2, 6).tolist())
FLEX_OPTIONS = ({}, {"scale": 0.3, "softcap": 20.0}, {"window": 100, "sinks": SINKS})
# Each dtype with each size and options, and each size with each options: all 18 take minutes.
FLEX = [
    (dtype, (64, 256)[(i + j) % 2], options)
    for i, dtype in enumerate((*HALF, torch.float32))
    for j, options in enumerate(FLEX_OPTIONS)
]


@pytest.mark.parametrize(("dtype", "size", "options"), FLEX)
def test_segment_attention_by_flex_attention(
    dtype: torch.dtype, size: int, options: dict[str, Any]
) -> None:
    torch._dynamo.reset()  # else the variants of other cases count towards the limit
    by_flex = functools.partial(segment_attention, implementation="flex")
    if "sinks" in options:
        options = {**options, "sinks": torch.tensor(options["sinks"], device="cuda")}
    assert_attention_is_right(by_flex, *attention_inputs(dtype, size), **options)


def test_segment_attention_by_a_mask() -> None:
    """Values and gradients; PyTorch's kernels may add up the gradients in any order."""
    tensors, segments = attention_inputs(torch.float32, 256)
    found = attention_and_gradients(
        segment_attention, tensors, segments, implementation="sdpa", window=100
    )
    wide = [x.double() for x in tensors]
    truth = attention_and_gradients(segment_attention_reference, wide, segments, window=100)
    for value, expected in zip(found, truth, strict=True):
        assert (value.double() - expected).norm() / expected.norm() < 1e-5


def test_segment_attention_says_when_it_runs_without_its_kernels() -> None:
    tensors, segments = attention_inputs(torch.float32, 264)
    with pytest.warns(UserWarning, match="segment attention runs as sdpa: the kernels take"):
        segment_attention(*tensors, segments)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("sequences", [1, 64, 4099])
def test_select_tokens_keeps_the_same_as_a_sort(
    dtype: torch.dtype, has_ties: bool, sequences: int
) -> None:
    """A million tokens and three; some scores infinite, a third not allowed."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = 2**20 + 3
    scores = torch.randn(num_tokens, generator=generator)
    scores = (scores.round() if has_ties else scores).to(dtype)
    scores[::1009], scores[5::2003] = torch.inf, -torch.inf
    mask = torch.rand(num_tokens, generator=generator) < 2 / 3
    cuts = torch.randint(num_tokens + 1, (sequences - 1,), generator=generator).sort().values
    ends = torch.tensor([0, *cuts.tolist(), num_tokens])
    for amount in ({"ratio": 0.2}, {"budget": 100}):
        for allowed in (None, mask):
            settings = {**amount, "per": "sequence", "lengths": ends.diff()}
            expected = select_tokens_reference(scores, allowed, **settings)
            on_gpu = None if allowed is None else allowed.cuda()
            settings["lengths"] = ends.diff().cuda()
            for implementation in ("triton", "torch"):
                kept = select_tokens(
                    scores.cuda(), on_gpu, **settings, implementation=implementation
                )
                assert torch.equal(kept.cpu(), expected)


def test_select_tokens_waits_for_nothing_and_a_graph_captures_it() -> None:
    scores = torch.randn(100_003, device="cuda")
    lengths = torch.tensor([40_000, 0, 60_003], device="cuda")

    def step() -> list[Tensor]:
        settings = {"per": "sequence", "lengths": lengths}
        return [
            select_tokens(scores, scores > -1, ratio=0.3),
            select_tokens(scores, budget=500, **settings),
            select_tokens(scores.double(), scores > -1, ratio=0.3, **settings),
        ]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
