"""`segment_attention` as calls of flash attention over ragged sequences, merged by log-sum-exp.

One call lets every segment see itself, causally. One more for each level of the forest lets all
that is below a segment see the whole of it: in preorder that is one run of queries and one of keys
for each segment of the level, and nothing is copied for a completion. Each pair of a token and a
segment above it comes in one call, so the softmax over a path is the merge of its parts; in
backward each call gets the merged output and log-sum-exp (`flash.py`).

N packed tokens, M segments, H heads, Hkv key-value heads, K head size of queries and keys, Kv of
values.
"""

from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.segment_attention.flash import Flash, Options, Sequences, flash_for
from fastrl_kernels.segments import Segments


class Call(NamedTuple):
    """One call of flash attention on some rows of the packed row."""

    queries: Tensor | slice
    """Rows, in the order of the sequences; each at most once."""
    keys: Tensor | slice
    sequences: Sequences


class Plan(NamedTuple):
    """All calls for a forest."""

    own: Call
    """Every segment on itself."""
    levels: list[Call]
    """Of the segments with as many above them, all that is below them on them."""
    longest_shared_path: int
    """Tokens of the longest path of several segments, 0 if there is none."""

    def calls(self, options: Options) -> list[tuple[Call, Options]]:
        """All of them; a window is a matter within segments."""
        unbounded = options._replace(window=None)
        return [(self.own, options), *((level, unbounded) for level in self.levels)]


_cache: WeakKeyDictionary[Segments, Plan] = WeakKeyDictionary()


@torch.compiler.disable  # the plan is made on the host
def segment_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    flash: Flash | None = None,
) -> Tensor:
    """`segment_attention` of at least one token, by `flash`; None picks it by the device.

    A window works where it hides nothing of another segment, and is an error elsewhere.
    """
    plan = plan_of(segments)
    if window is not None and window < plan.longest_shared_path:
        raise ValueError(
            'implementation="varlen" takes no window that ends in the segments above: expected at '
            f"least {plan.longest_shared_path} tokens, the longest path of several segments, got "
            f'{window}; use "auto"'
        )
    options = Options(scale, window, softcap)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _Varlen.apply(q, k, v, sinks, plan, options, flash or flash_for(q))


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan,
        options: Options, flash: Flash,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(q.device.type, enabled=False):
            out, lse = _forward(q, k, v, sinks, plan, options, flash)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.constants = plan, options, flash
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            gradients = _backward(grad.contiguous(), q, k, v, out, lse, *ctx.constants)
            dsinks = None
            if sinks is not None:
                deltas = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).mT  # (H, N)
                dsinks = -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * deltas).sum(1)
                dsinks = dsinks.to(sinks.dtype)
        return *gradients, dsinks, None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan, options: Options,
    flash: Flash,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (N, H, Kv) in the dtype of q, and log-sum-exp (H, N) over paths and sinks."""
    dtype = accumulation_dtype(q.dtype)
    first, *others = plan.calls(options)
    # Every token belongs to a segment, so the rows of the first call are all rows.
    out, lse = (x.to(dtype) for x in _call(*first, q, k, v, flash))
    for call, constants in others:
        part, part_lse = _call(call, constants, q, k, v, flash)
        before = lse[:, call.queries]
        merged = torch.logaddexp(before, part_lse.to(dtype))
        out[call.queries] = (
            out[call.queries] * torch.exp(before - merged).mT[..., None]
            + part.to(dtype) * torch.exp(part_lse.to(dtype) - merged).mT[..., None]
        )
        lse[:, call.queries] = merged
    if sinks is not None:
        merged = torch.logaddexp(lse, sinks.to(dtype)[:, None])
        out, lse = out * torch.exp(lse - merged).mT[..., None], merged
    return out.to(q.dtype), lse


def _call(
    call: Call, options: Options, q: Tensor, k: Tensor, v: Tensor, flash: Flash
) -> tuple[Tensor, Tensor]:
    queries = q[call.queries]
    out, lse = flash.forward(queries, k[call.keys], v[call.keys], call.sequences, options)
    if lse.shape != (q.shape[1], queries.shape[0]):
        raise ValueError(
            f"expected {flash.name} to return log-sum-exp of shape "
            f"{(q.shape[1], queries.shape[0])}, got {tuple(lse.shape)}; "
            'use implementation="auto"'
        )
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan,
    options: Options, flash: Flash,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v: the calls' own, added up in the dtype of sums in a fixed order."""
    totals = [x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v)]
    for call, constants in plan.calls(options):
        gradients = flash.backward(
            grad[call.queries], q[call.queries], k[call.keys], v[call.keys], out[call.queries],
            lse[:, call.queries].contiguous(), call.sequences, constants,
        )  # fmt: skip
        for total, part, rows in zip(
            totals, gradients, (call.queries, call.keys, call.keys), strict=True
        ):
            total[rows] += part  # no row comes twice, so there is one order
    dq, dk, dv = (total.to(x.dtype) for total, x in zip(totals, (q, k, v), strict=True))
    return dq, dk, dv


def plan_of(segments: Segments) -> Plan:
    """The calls of a forest; kept for the next layer as long as the forest lives."""
    plan = _cache.get(segments)
    if plan is None:
        # Tables made under inference mode could not be used in the backward of the update.
        with torch.inference_mode(False):
            plan = _cache[segments] = make_plan(segments)
    return plan


def make_plan(segments: Segments) -> Plan:
    """The calls of a forest with at least one token."""
    host, device = segments.host, segments.ends.device
    lengths, starts, parents = host.lengths.tolist(), host.starts.tolist(), host.parents.tolist()
    depths, subtree_ends = host.depths.tolist(), host.subtree_ends.tolist()
    own: list[tuple[int, int]] = []  # first row and the row after the last
    levels: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = []  # queries and keys
    num_above: list[int] = []  # segments with tokens on the way from the root
    longest_shared_path = 0
    for segment, (parent, length) in enumerate(zip(parents, lengths, strict=True)):
        level = 0 if parent < 0 else num_above[parent] + (lengths[parent] > 0)
        num_above.append(level)
        if length == 0:
            continue
        end = starts[segment] + length
        own.append((starts[segment], end))
        if depths[segment]:
            longest_shared_path = max(longest_shared_path, depths[segment] + length)
        if end < subtree_ends[segment]:
            if level == len(levels):
                levels.append(([], []))
            levels[level][0].append((end, subtree_ends[segment]))
            levels[level][1].append(own[-1])
    calls = [_make_call(queries, keys, False, device) for queries, keys in levels]
    return Plan(_make_call(own, own, True, device), calls, longest_shared_path)


def _make_call(
    queries: list[tuple[int, int]], keys: list[tuple[int, int]], is_causal: bool,
    device: torch.device,
) -> Call:  # fmt: skip
    """From the first row and the row after the last of each sequence's queries and keys."""
    query_lengths, key_lengths = ([end - start for start, end in runs] for runs in (queries, keys))
    sequences = Sequences(
        _ends(query_lengths, device), _ends(key_lengths, device), query_lengths, key_lengths,
        is_causal,
    )  # fmt: skip
    return Call(_rows(queries, device), _rows(keys, device), sequences)


def _rows(runs: list[tuple[int, int]], device: torch.device) -> Tensor | slice:
    """The rows of all runs: a slice where they are one, which copies nothing."""
    follows = all(end == start for (_, end), (start, _) in pairwise(runs))
    if follows:
        return slice(runs[0][0], runs[-1][1])
    return torch.cat([torch.arange(start, end) for start, end in runs]).to(device)


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(device=device, dtype=torch.int32)
