"""Calls that together launch every Triton kernel, on small odd shapes, for sanitize.py.

S tokens, D hidden, V vocabulary, H heads, K head size. Ignored rows hold NaN. On a GPU the sizes
leave ragged ends in every block, and most loops take more than one turn; the interpreter, whose
blocks are small, gets smaller ones.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))  # this checkout, installed or not

from fastrl_kernels import (
    LMHead,
    decode_attention,
    linear_logps,
    make_segments,
    policy_loss,
    segment_attention,
    select_tokens,
    selected_logps,
    token_loss,
)
from fastrl_kernels.adamw import Keys, Moments, Rates, adamw_step, split
from fastrl_kernels.adamw.blockwise import decode_first, decode_second, encode_first, encode_second
from fastrl_kernels.objectives import Objective, Regulariser, clipped_ratio, k3

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCES = {BF16: 3e-2, FP16: 5e-3, FP32: 1e-4}
"""Of ||difference|| / ||truth||: enough to tell right from wrong, no claim of accuracy."""
OBJECTIVE = Objective(clipped_ratio, (0.2, 0.28), (Regulariser(k3, 0.04),))
RATES = Rates(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=5)
KEYS = Keys(moments=0x123456789ABCDEF0, weights=0x7EDCBA9876543210)
FOREST = ([70, 65, 1, 129, 66, 64], [-1, 0, 0, 0, 3, -1])
SMALL_FOREST = ([35, 9, 1, 3], [-1, 0, 0, -1])


class Sizes(NamedTuple):
    """How large the tensors are."""

    tokens: int
    hidden: int
    vocabulary: int
    heads: int
    """Of keys and values; twice as many of queries."""
    forest: tuple[list[int], list[int]]
    prefixes: tuple[int, ...]
    """Tokens of each."""
    rows: tuple[int, ...]
    """That continue each prefix."""
    suffix: int
    scores: int
    elements: int
    workspace_mb: float


ON_GPU = Sizes(
    131, 72, 2059, 2, FOREST, (300, 5, 0, 517), (9, 0, 1, 4), 270, 10007, 2125, 4.0
)  # fmt: skip
INTERPRETED = Sizes(
    19, 21, 101, 1, SMALL_FOREST, (37, 5, 0), (3, 0, 1), 5, 211, 301, 0.5
)  # fmt: skip


class Case(NamedTuple):
    """A call, and the kernels that it has to launch."""

    name: str
    inputs: Callable[[Sizes, torch.Generator], dict[str, Any]]
    """float32 tensors on the CPU, and whatever else the call takes."""
    call: Callable[..., list[Tensor]]
    """Results and gradients of such inputs; its first argument is the implementation."""
    dtype: torch.dtype
    kernels: frozenset[str]
    widens: bool = True
    """Whether the truth is that of float64 inputs."""

    def run(self, device: str) -> list[Tensor]:
        """With the kernels."""
        return self.call("triton", **self._inputs(device, device))

    def differences(self, found: Sequence[Tensor]) -> str:
        """What is wrong with these results; empty where nothing is."""
        inputs = self._inputs("cuda" if found[0].is_cuda else "cpu", "cpu")
        if self.widens:
            inputs = mapped(inputs, torch.Tensor.double)
        for index, (value, expected) in enumerate(
            zip(found, self.call("torch", **inputs), strict=True)
        ):
            value, expected = value.detach().cpu().double(), expected.detach().double()
            error = float((value - expected).norm() / expected.norm().clamp_min(1e-30))
            if not error <= TOLERANCES[self.dtype]:  # which NaN is not
                return f"result {index} is off by {error:.1e}"
        return ""

    def _inputs(self, sized_for: str, device: str) -> dict[str, Any]:
        sizes = ON_GPU if sized_for == "cuda" else INTERPRETED
        inputs = self.inputs(sizes, torch.Generator().manual_seed(0))
        inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        return mapped(inputs, lambda x: x.to(self.dtype)) if self.widens else inputs


def mapped(inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The floating-point tensors changed."""
    return {
        name: change(x) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def head_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Any]:
    """Hidden states and a head with everything that one may have."""
    S, D, V = sizes.tokens, sizes.hidden, sizes.vocabulary
    normal = functools.partial(torch.randn, generator=generator)
    weight = normal(V, D) / D**0.5
    target_ids = torch.randint(V - 3, (S,), generator=generator)
    hidden = 3 * weight[target_ids] + 0.3 * normal(S, D)
    hidden[::7], target_ids[::7] = torch.nan, -1
    return {
        "hidden": hidden, "weight": weight, "bias": normal(V), "lora_a": normal(3, D) / D**0.5,
        "lora_b": normal(V, 3), "target_ids": target_ids, "per_token": normal(4, S),
        "workspace_mb": sizes.workspace_mb,
    }  # fmt: skip


def call_linear_logps(implementation: str, **inputs: Any) -> list[Tensor]:
    """Statistics, and gradients of a weighting of logps and entropies."""
    hidden, head, leaves = _head(inputs)
    out = linear_logps(
        hidden, head, inputs["target_ids"], temperature=0.8, implementation=implementation,
        workspace_mb=inputs["workspace_mb"],
    )  # fmt: skip
    slopes = [x.to(out.logps.dtype) for x in inputs["per_token"][:2]]
    gradients = torch.autograd.grad([out.logps, out.entropies], leaves, slopes)
    return [out.logps, out.entropies, out.lse, out.sum_p2, out.sum_p3, *gradients]


def call_policy_loss(implementation: str, *, settings: dict[str, Any], **inputs: Any) -> Any:
    """Loss, log-probabilities and gradients."""
    hidden, head, leaves = _head(inputs)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    advantages, logps, others, weights = inputs["per_token"].to(dtype)
    out = policy_loss(
        hidden, head, inputs["target_ids"], advantages, weights.abs(), objective=OBJECTIVE,
        old_logps=-logps.abs(), ref_logps=-others.abs(), entropy_coef=0.01, temperature=0.8,
        workspace_mb=inputs["workspace_mb"], implementation=implementation, **settings,
    )  # fmt: skip
    return [out.loss, out.logps, out.entropies, *torch.autograd.grad(out.loss, leaves)]


def _head(inputs: dict[str, Any]) -> tuple[Tensor, LMHead, list[Tensor]]:
    names = ("hidden", "weight", "bias", "lora_a", "lora_b")
    leaves = [inputs[name].detach().requires_grad_() for name in names]
    vocab_size = len(inputs["weight"]) - 3
    return leaves[0], LMHead(*leaves[1:], softcap=30.0, vocab_size=vocab_size), leaves


def logits_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Any]:
    """Logits of some spread, every seventh row ignored."""
    S, V = sizes.tokens, sizes.vocabulary
    target_ids = torch.randint(V, (S,), generator=generator)
    target_ids[::7] = -1
    return {
        "logits": 3 * torch.randn(S, V, generator=generator), "target_ids": target_ids,
        "per_token": torch.randn(2, S, generator=generator),
    }  # fmt: skip


def call_selected_logps(implementation: str, **inputs: Any) -> list[Tensor]:
    """Statistics and the gradient of the logits."""
    logits = inputs["logits"].detach().requires_grad_()
    out = selected_logps(logits, inputs["target_ids"], implementation=implementation)
    slopes = [x.to(out.logps.dtype) for x in inputs["per_token"]]
    gradient = torch.autograd.grad([out.logps, out.entropies], logits, slopes)
    return [out.logps, out.entropies, *gradient]


def token_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Any]:
    """Numbers of tokens, more than one block of them."""
    return {"numbers": torch.randn(6, 8 * sizes.tokens, generator=generator)}


def call_token_loss(implementation: str, *, numbers: Tensor) -> list[Tensor]:
    """Loss, metrics and slopes."""
    logps, entropies, advantages, old, ref, weights = numbers.detach()
    logps, entropies = logps.contiguous().requires_grad_(), entropies.contiguous().requires_grad_()
    out = token_loss(
        logps, entropies, advantages, weights.abs(), objective=OBJECTIVE, old_logps=old,
        ref_logps=ref, entropy_coef=0.01, implementation=implementation,
    )  # fmt: skip
    gradients = torch.autograd.grad(out.loss, [logps, entropies])
    return [out.loss, out.slopes, torch.stack(out[3:]), *gradients]


def score_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Any]:
    """Scores with ties, some forbidden, in sequences of which one is empty."""
    scores = torch.randn(sizes.scores, generator=generator).mul(8).round()
    third = sizes.scores // 3
    return {
        "scores": scores, "mask": torch.rand(sizes.scores, generator=generator) < 0.7,
        "lengths": torch.tensor([third, 0, sizes.scores - third]),
    }  # fmt: skip


def call_select_tokens(
    implementation: str, *, scores: Tensor, mask: Tensor, lengths: Tensor
) -> list[Tensor]:
    """By a share and by a number."""
    return [
        select_tokens(scores, mask, ratio=0.3, implementation=implementation),
        select_tokens(
            scores, budget=17, per="sequence", lengths=lengths, implementation=implementation
        ),
    ]


def attention_inputs(sizes: Sizes, generator: torch.Generator, size: int) -> dict[str, Any]:
    """q, k and v of a forest two levels deep."""
    tokens, heads = sum(sizes.forest[0]), sizes.heads
    shapes = {
        "q": (tokens, 2 * heads, size), "k": (tokens, heads, size), "v": (tokens, heads, size - 4)
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**tensors, "sinks": torch.linspace(-1, 2, 2 * heads), "forest": sizes.forest}


def call_segment_attention(
    implementation: str, *, settings: dict[str, Any], has_sinks: bool, **inputs: Any
) -> list[Tensor]:
    """Outputs and gradients."""
    names = ("q", "k", "v", "sinks")[: 3 + has_sinks]
    leaves = [inputs[name].detach().requires_grad_() for name in names]
    segments = make_segments(*inputs["forest"]).to(inputs["q"].device)
    sinks = leaves[3] if has_sinks else None
    out = segment_attention(
        *leaves[:3], segments, sinks=sinks, implementation=implementation, **settings
    )
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def decode_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Any]:
    """Groups of many rows, none and one; NaN behind the tokens of a prefix."""
    rows, heads, longest = sum(sizes.rows), sizes.heads, max(sizes.prefixes) + 3
    normal = functools.partial(torch.randn, generator=generator)
    prefixes = [normal(len(sizes.rows), heads, longest, 20) for _ in range(2)]
    suffixes = [normal(rows, heads, sizes.suffix + 3, 20) for _ in range(2)]
    lengths = torch.tensor(sizes.prefixes, dtype=torch.int32)
    behind = (torch.arange(longest) >= lengths[:, None])[:, None, :, None]
    return {
        "q": normal(rows, 3 * heads, 20),
        "prefixes_k": prefixes[0].masked_fill(behind, torch.nan),
        "prefixes_v": prefixes[1].masked_fill(behind, torch.nan),
        "suffixes_k": suffixes[0],
        "suffixes_v": suffixes[1],
        "row_groups": torch.repeat_interleave(torch.tensor(sizes.rows)).int(),
        "prefix_lengths": lengths,
        "suffix_length": sizes.suffix,
    }


def call_decode_attention(implementation: str, **inputs: Any) -> list[Tensor]:
    """Plain, and with all that it can have."""
    where = {name: inputs.pop(name) for name in ("row_groups", "prefix_lengths", "suffix_length")}
    tensors = list(inputs.values())
    sinks = torch.linspace(-1, 2, tensors[0].shape[1], device=tensors[0].device)
    options = {"window": 30, "softcap": 20.0, "sinks": sinks}
    return [
        decode_attention(*tensors, **where, **some, implementation=implementation)
        for some in ({}, options)
    ]


def adamw_inputs(sizes: Sizes, generator: torch.Generator, in_8bit: bool) -> dict[str, Any]:
    """Weights in two parts, gradients in bfloat16, moments as they are kept."""
    n = sizes.elements
    normal = functools.partial(torch.randn, n, generator=generator)
    weights, remainders = split(normal())
    moments: dict[str, Any] = {"first": normal(), "second": normal().square() + 0.1}
    if in_8bit:
        chances = torch.rand(n, generator=generator)
        moments["first"], moments["first_scales"] = encode_first(moments["first"], chances)
        moments["second"], moments["second_scales"] = encode_second(moments["second"], chances)
    return {
        "weights": weights, "remainders": remainders, "gradients": normal().bfloat16(), **moments
    }  # fmt: skip


def call_adamw(implementation: str, **inputs: Tensor) -> list[Tensor]:
    """Weights and moments after a step."""
    weights, remainders, gradients = (
        inputs.pop(name) for name in ("weights", "remainders", "gradients")
    )
    moments = Moments(**inputs)
    adamw_step(
        weights, gradients, moments, RATES, remainders=remainders, keys=KEYS,
        implementation=implementation,
    )  # fmt: skip
    if moments.first_scales is None or moments.second_scales is None:
        return [weights, moments.first, moments.second]
    return [
        weights, decode_first(moments.first, moments.first_scales),
        decode_second(moments.second, moments.second_scales),
    ]  # fmt: skip


PRODUCTS = frozenset({"hidden_gradients_kernel", "weight_gradients_kernel", "column_sums_kernel"})
LOGITS = PRODUCTS | {"logits_kernel"}
GATHER = LOGITS | {"fix_up_kernel", "active_slots_kernel"}
LOGPS = LOGITS | {"statistics_kernel", "slice_gradients_kernel"}
ATTENTION = frozenset(
    {"forward_kernel", "deltas_kernel", "query_gradients_kernel", "key_gradients_kernel",
     "sum_units_kernel"}
)  # fmt: skip


def _policy(name: str, dtype: torch.dtype, kernels: frozenset[str], **settings: Any) -> Case:
    call = functools.partial(call_policy_loss, settings=settings)
    return Case(f"policy_loss {name}", head_inputs, call, dtype, kernels)


def _attention(name: str, dtype: torch.dtype, size: int, has_sinks: bool, **settings: Any) -> Case:
    inputs = functools.partial(attention_inputs, size=size)
    call = functools.partial(call_segment_attention, settings=settings, has_sinks=has_sinks)
    return Case(f"segment_attention {name}", inputs, call, dtype, ATTENTION)


def _adamw(name: str, in_8bit: bool) -> Case:
    inputs = functools.partial(adamw_inputs, in_8bit=in_8bit)
    return Case(f"adamw {name}", inputs, call_adamw, BF16, frozenset({"adamw_kernel"}), False)


DECODE = frozenset({"tiles_kernel", "parts_kernel", "merge_kernel"})
STORED = frozenset({"stored_logits_kernel", "statistics_kernel", "stored_gradients_kernel"})
SELECTION = frozenset({"count_digits_kernel", "keep_kernel"})
ONE_PASS = {"engine": "one_pass", "products": "gather"}
CASES = (
    _policy("gather bf16", BF16, GATHER, **ONE_PASS),
    _attention("bf16", BF16, 36, False),
    Case("linear_logps bf16", head_inputs, call_linear_logps, BF16, LOGPS),
    Case("decode_attention bf16", decode_inputs, call_decode_attention, BF16, DECODE),
    _policy("min_memory bf16", BF16, LOGPS | {"token_losses_kernel"}, engine="min_memory"),
    _attention("bf16, window, softcap, sinks", BF16, 36, True, window=50, softcap=20.0),
    _policy("gather fp16", FP16, GATHER | {"gradients_kernel"}, **ONE_PASS),
    _policy(
        "cublas fp32", FP32, frozenset({"stored_logits_kernel", "fix_up_kernel"}),
        engine="one_pass", products="cublas",
    ),
    Case("selected_logps bf16", logits_inputs, call_selected_logps, BF16, STORED),
    Case("token_loss", token_inputs, call_token_loss, FP32, frozenset({"token_losses_kernel"})),
    Case("select_tokens", score_inputs, call_select_tokens, FP32, SELECTION),
    _adamw("split weights, 8 bits", True),
    _adamw("split weights", False),
    _policy("gather fp32", FP32, GATHER, **ONE_PASS),
    Case("linear_logps fp32", head_inputs, call_linear_logps, FP32, LOGPS),
    _attention("fp32, heads of 132", FP32, 132, False),
    _attention("bf16, heads of 132", BF16, 132, True, window=50),
    Case("decode_attention fp32", decode_inputs, call_decode_attention, FP32, DECODE),
    Case("selected_logps fp32", logits_inputs, call_selected_logps, FP32, STORED),
)  # fmt: skip
