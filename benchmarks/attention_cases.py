"""Attention of one group, a prompt of P tokens with G completions of R tokens, by every way to it.

attention          outputs, then gradients of q, k and v for a random gradient of the outputs
attention_forward  outputs without gradient

"repeated rows" attend over a row for each completion, whose copies of the prompt are there already:
what it takes to make them is not counted. All others have the prompt once. Where lengths are
log-normal, R is their mean and rows of a batch are padded to the longest.
N packed tokens, H heads, Hkv key-value heads, K head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from cases import Loaders, Prepared
from implementations import load
from inputs import log_normal_lengths
from measure import Step
from peers import Absent, require_cuda
from reference import Errors
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (..., H, K), k and v (..., Hkv, K) -> (..., H, K), where ... is N, or G and P + R."""


@dataclass(frozen=True)
class Group:
    """What a case is large in."""

    prompt: int
    completion: int
    num_generations: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: str
    spread: float = 0.0
    """Standard deviation of the logarithm of the completions' lengths."""

    def __str__(self) -> str:
        """As a case is named."""
        lengths = (
            f"{self.completion} log-normal {self.spread:g}" if self.spread else self.completion
        )
        return (
            f"P={self.prompt} R={lengths} G={self.num_generations} H={self.num_heads} "
            f"Hkv={self.num_kv_heads} K={self.head_size} {str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def completions(self) -> list[int]:
        """Their lengths, drawn with a fixed seed."""
        return log_normal_lengths(self.completion, self.num_generations, self.spread)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.prompt + sum(self.completions)

    @property
    def num_pairs(self) -> int:
        """Of a token and one that it sees."""
        P = self.prompt
        return P * (P + 1) // 2 + sum(R * P + R * (R + 1) // 2 for R in self.completions)

    @property
    def packed_rows(self) -> list[Tensor]:
        """Int64 (P + R,): the packed tokens of each completion with its prompt."""
        parts = torch.arange(self.prompt, self.num_tokens).split(self.completions)
        prompt = torch.arange(self.prompt)
        return [torch.cat([prompt, part]).to(self.device) for part in parts]

    @property
    def padded_rows(self) -> Tensor:
        """(G, P + longest R) int64: the same padded with N, which is no token."""
        return pad_sequence(self.packed_rows, batch_first=True, padding_value=self.num_tokens)

    @property
    def joined_rows(self) -> Tensor:
        """(sum of P + R,) int64: the same one after the other."""
        return torch.cat(self.packed_rows)


@dataclass(frozen=True)
class AttentionCase:
    """One operation at one size."""

    operation: str
    shape: Group

    def __str__(self) -> str:
        """Name of the case in the results."""
        return f"{self.operation} {self.shape}"


class Inputs(NamedTuple):
    """Random normal; the first three require gradients."""

    q: Tensor  # (N, H, K)
    k: Tensor  # (N, Hkv, K)
    v: Tensor  # (N, Hkv, K)
    grad_out: Tensor  # (N, H, K)


class Result(NamedTuple):
    """What one call left behind."""

    out: Tensor
    leaves: Inputs  # with gradients, if any
    rows: Tensor | None
    """Of what is not packed, which packed token is where; N is none."""
    num_tokens: int

    def packed(self, x: Tensor, *, is_sum: bool) -> Tensor:
        """(N, heads, K) float64; of the copies of a token their sum, or the first one's value."""
        if self.rows is None:
            return x.double()
        places, values = self.rows.flatten(), x.double().reshape(-1, *x.shape[-2:])
        total = values.new_zeros(self.num_tokens + 1, *x.shape[-2:])
        if is_sum:
            return total.index_add(0, places, values)[:-1]
        first = is_first(self.rows).flatten()
        total[places[first]] = values[first]
        return total[:-1]


def is_first(rows: Tensor) -> Tensor:
    """Whether a place is the first one of its token."""
    places = rows.flatten()
    order = torch.arange(len(places), device=rows.device)
    first = torch.full((int(places.max()) + 1,), len(places), device=rows.device)
    first = first.scatter_reduce(0, places, order, "amin")
    return (first[places] == order).view(rows.shape)


class Reference(NamedTuple):
    """Float64 outputs and gradients."""

    out: Tensor
    grads: list[Tensor]


def prepare(case: AttentionCase, only: str | None = None, kept: set[str] | None = None) -> Prepared:
    """Inputs and steps of a case: of all implementations, of those kept or of the one named."""
    inputs, group = make_inputs(case.shape), case.shape
    loaders = attention_loaders(group)
    if kept is not None:
        loaders = {name: loader for name, loader in loaders.items() if name in kept}
    if only is not None:
        loaders = {only: loaders[only]}
    functions = load(loaders, group.device).functions
    laid_out = {name: lay_out(inputs, rows_of(name, group)) for name in functions}
    with_backward = case.operation == "attention"
    reference = functools.cache(lambda: make_reference(inputs, group))
    flops = (3.5 if with_backward else 1.0) * 4 * group.num_pairs
    flops *= group.num_heads * group.head_size
    heads = (4 if with_backward else 2) * (group.num_heads + group.num_kv_heads)
    return Prepared(
        steps={
            name: make_step(
                run,
                laid_out[name],
                rows_of(name, group),
                group.num_tokens,
                with_backward=with_backward,
            )
            for name, run in functions.items()
        },
        leaves=tuple({id(x): x for given in laid_out.values() for x in given[:3]}.values()),
        check=lambda result: compare(result, reference(), with_backward),
        make_floor=lambda: bare_products(flops, group),
        floor_name="bare matrix products",
        flops=flops,
        num_bytes=heads * group.num_tokens * group.head_size * group.dtype.itemsize,
        formulas=FORMULAS[with_backward],
    )


def make_inputs(group: Group, *, seed: int = 0) -> Inputs:
    """One seed, one input."""
    random = torch.Generator(group.device).manual_seed(seed)

    def normal(num_heads: int) -> Tensor:
        size = (group.num_tokens, num_heads, group.head_size)
        return torch.randn(size, generator=random, device=group.device).to(group.dtype)

    q, k, v = (normal(heads) for heads in (group.num_heads, group.num_kv_heads, group.num_kv_heads))
    return Inputs(*(x.requires_grad_() for x in (q, k, v)), normal(group.num_heads))


def lay_out(inputs: Inputs, rows: Tensor | None) -> Inputs:
    """The inputs in rows, where they are given."""
    if rows is None:
        return inputs
    num_tokens = len(inputs.q)
    given = rows.clamp(max=num_tokens - 1)  # what is in the padding does not matter
    *tensors, grad_out = (x.detach()[given] for x in inputs)
    # The prompt's gradient comes once, that of the padding never.
    grad_out[~is_first(rows) | (rows == num_tokens)] = 0
    return Inputs(*(x.requires_grad_() for x in tensors), grad_out)


def make_step(
    run: Attention, leaves: Inputs, rows: Tensor | None, num_tokens: int, *, with_backward: bool
) -> Step:
    """Outputs, then gradients into the leaves."""

    def forward() -> Result:
        with torch.no_grad():
            return Result(run(*leaves[:3]), leaves, rows, num_tokens)

    def backward() -> Result:
        leaves.q.grad = leaves.k.grad = leaves.v.grad = None
        out = run(*leaves[:3])
        out.backward(leaves.grad_out)
        return Result(out.detach(), leaves, rows, num_tokens)

    return backward if with_backward else forward


def make_reference(inputs: Inputs, group: Group) -> Reference:
    """One path at a time in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs[:3]]
    out = fastrl_attention(group.device, group=group, implementation="torch")(*wide)
    return Reference(out.detach(), list(torch.autograd.grad(out, wide, inputs.grad_out.double())))


def compare(result: Result, reference: Reference, with_backward: bool) -> Errors:
    """||error|| / ||reference|| of the outputs, of dq, and of dk and dv together."""

    def distance(found: list[Tensor], true: list[Tensor]) -> float:
        pairs = list(zip(found, true, strict=True))
        error = sum(float((x - y).square().sum()) for x, y in pairs)
        return (error / sum(float(y.square().sum()) for _, y in pairs)) ** 0.5

    out = distance([result.packed(result.out, is_sum=False)], [reference.out])
    if not with_backward:
        return Errors(logps=out)
    grads = [
        result.packed(torch.full_like(x, torch.nan) if x.grad is None else x.grad, is_sum=True)
        for x in result.leaves[:3]
    ]
    dq = distance(grads[:1], reference.grads[:1])
    return Errors(logps=out, hidden_grad=dq, weight_grad=distance(grads[1:], reference.grads[1:]))


def bare_products(flops: float, group: Group) -> Step:
    """Square matrix products with about as many operations as the visible pairs take."""
    size = 4096 if group.device == "cuda" else 256
    count = max(1, round(flops / (2 * size**3)))
    left, right = torch.randn(2, size, size, device=group.device).to(group.dtype)
    out = torch.empty_like(left)

    def step() -> None:
        for _ in range(count):
            torch.mm(left, right, out=out)

    return step


def fastrl_attention(device: str, *, group: Group, implementation: str) -> Attention:
    """`fastrl_kernels.segment_attention`."""
    lengths = [group.prompt, *group.completions]
    return _attention_of(lengths, [-1] + [0] * group.num_generations, device, implementation)


def _attention_of(
    lengths: list[int], parents: list[int], device: str, implementation: str
) -> Attention:
    from fastrl_kernels import make_segments, segment_attention

    segments = make_segments(lengths, parents).to(torch.device(device))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return segment_attention(q, k, v, segments, implementation=implementation)

    return attention


def fastrl_kernels_attention(device: str, *, group: Group) -> Attention:
    """The kernels on a GPU, paths on a CPU."""
    name = "triton" if device == "cuda" else "torch"
    return fastrl_attention(device, group=group, implementation=name)


def flex(device: str, *, group: Group) -> Attention:
    """FlexAttention through our adapter."""
    require_cuda(device)
    return fastrl_attention(device, group=group, implementation="flex")


def two_calls(device: str, *, group: Group) -> Attention:
    """Two flash calls merged by log-sum-exp, through our adapter."""
    require_cuda(device)
    return fastrl_attention(device, group=group, implementation="varlen")


def mask(device: str, *, group: Group) -> Attention:
    """PyTorch's attention with an (N, N) mask, through our adapter."""
    if group.num_tokens > 16384:
        raise Absent(f"a mask of {group.num_tokens} by {group.num_tokens} is too large")
    return fastrl_attention(device, group=group, implementation="sdpa")


def repeated_sdpa(device: str, *, group: Group) -> Attention:
    """PyTorch's causal attention over G rows, padded on the right, where nobody looks."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return attention


def repeated_varlen(device: str, *, group: Group) -> Attention:
    """Flash attention of variable length over G rows, one call; no padding."""
    require_cuda(device)
    lengths = [group.prompt + completion for completion in group.completions]
    return _attention_of(lengths, [-1] * group.num_generations, device, "varlen")


def prefix_grouper(device: str, *, group: Group) -> Attention:
    """The package of that name, around PyTorch's attention."""
    from prefix_grouper import PrefixGrouper
    from torch.nn.attention.bias import causal_lower_right  # imports the compiler, which is slow

    grouper = PrefixGrouper([[group.prompt, *group.completions]], device=device)

    def causal(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        hidden = causal_lower_right(q.shape[2], k.shape[2])  # padding is on the right
        out = scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=True)
        return out.transpose(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grouper.forward(causal, *(x.transpose(0, 1)[None] for x in (q, k, v)))[0]

    return attention


def attention_loaders(group: Group) -> Loaders:
    """All implementations for a group of this size."""
    loaders: dict[str, Callable[..., Attention]] = {
        "fastrl segment_attention": fastrl_kernels_attention,
        "sdpa, repeated rows": repeated_sdpa,
        "varlen flash, repeated rows": repeated_varlen,
        "flex": flex,
        "two varlen calls": two_calls,
        "sdpa, mask": mask,
        "prefix_grouper": prefix_grouper,
    }
    return {name: functools.partial(loader, group=group) for name, loader in loaders.items()}


def rows_of(name: str, group: Group) -> Tensor | None:
    """The layout of an implementation; None where that is the packed one."""
    if name == "sdpa, repeated rows":
        return group.padded_rows
    return group.joined_rows if name == "varlen flash, repeated rows" else None


FORMULAS = {
    False: "flops = 4 H K pairs seen; bytes = 2 (H + Hkv) N K e: q, k, v read, outputs written",
    True: "flops = 14 H K pairs seen (5 products back, 2 forward); bytes = 4 (H + Hkv) N K e: "
    "q, k, v, outputs and their gradients once",
}
