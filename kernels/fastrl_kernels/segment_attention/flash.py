"""Flash attention of ragged sequences at its raw end: log-sum-exp out, gradients from a given one.

A softmax over several sets of keys can be computed set by set. With the output and log-sum-exp of
the whole softmax, the gradients of one set need nothing of the others: probabilities are
exp(score - lse), and what they are compared with is the output times its gradient. So backward here
takes output and log-sum-exp as inputs (as ring attention does, arXiv:2310.01889).

Three of a kind: flash-attn's kernels, those that PyTorch ships, and plain PyTorch for any device
and dtype. The first two are untested on a GPU.
T tokens, B sequences, H heads, Hkv key-value heads, K head size.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype

HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


class Sequences(NamedTuple):
    """B runs of queries, each with its run of keys; both lie side by side and none is empty."""

    query_ends: Tensor
    """(B + 1,) int32 from 0: where each sequence ends among the queries."""
    key_ends: Tensor
    """(B + 1,) int32: the same among the keys."""
    query_lengths: list[int]
    key_lengths: list[int]
    is_causal: bool
    """Whether a query sees no later key; its sequence has as many keys as queries then."""

    @property
    def longest(self) -> tuple[int, int]:
        """Of queries and of keys; at 1 the kernels would take each sequence to have one query."""
        return max(2, *self.query_lengths), max(2, *self.key_lengths)

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Queries and keys of each sequence."""
        query = key = 0
        for num_queries, num_keys in zip(self.query_lengths, self.key_lengths, strict=True):
            yield slice(query, query + num_queries), slice(key, key + num_keys)
            query, key = query + num_queries, key + num_keys


class Options(NamedTuple):
    """Constants of the scores; a window is for causal sequences, the query's own token included."""

    scale: float
    window: int | None
    softcap: float | None


Forward = Callable[[Tensor, Tensor, Tensor, Sequences, Options], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequences, Options],
    tuple[Tensor, Tensor, Tensor],
]


class Flash(NamedTuple):
    """forward(q, k, v, sequences, options) -> outputs (T, H, K), log-sum-exp (H, T).

    backward(grad, q, k, v, outputs, log-sum-exp, sequences, options) -> gradients of q, k and v,
    where outputs and log-sum-exp are those of the whole softmax. (H, T) is contiguous.
    """

    name: str
    forward: Forward
    backward: Backward


def flash_for(q: Tensor) -> Flash:
    """The one that runs for these queries."""
    if not q.is_cuda:
        return PLAIN
    return flash_attn_kernels() if HAS_FLASH_ATTN else PYTORCH


def flash_attn_kernels() -> Flash:
    """Those of the package flash-attn."""
    from flash_attn.flash_attn_interface import (  # type: ignore[import-not-found]
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
    )

    def forward(
        q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options
    ) -> tuple[Tensor, Tensor]:
        is_causal, left, right = _reach(sequences, options)
        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, sequences.query_ends, sequences.key_ends, *sequences.longest, 0.0,
            options.scale, is_causal, window_size_left=left, window_size_right=right,
            softcap=options.softcap or 0.0,
        )  # fmt: skip
        return out, lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        sequences: Sequences, options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        gradients = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        is_causal, left, right = _reach(sequences, options)
        _flash_attn_varlen_backward(
            grad, q, k, v, out, lse, *gradients, sequences.query_ends, sequences.key_ends,
            *sequences.longest, 0.0, options.scale, is_causal, window_size_left=left,
            window_size_right=right, softcap=options.softcap or 0.0, alibi_slopes=None,
            deterministic=True,
        )  # fmt: skip
        return gradients

    return Flash("flash-attn", forward, backward)


def _pytorch_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor]:
    assert options.softcap is None
    is_causal, left, right = _reach(sequences, options)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, sequences.query_ends, sequences.key_ends, *sequences.longest, 0.0, is_causal,
        False, scale=options.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse


def _pytorch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    is_causal, left, right = _reach(sequences, options)
    # States of the random numbers for dropout, of which there is none.
    seed, unused = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)
    with deterministic_algorithms():
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, sequences.query_ends, sequences.key_ends, *sequences.longest,
            0.0, is_causal, seed, unused, scale=options.scale, window_size_left=left,
            window_size_right=right,
        )  # fmt: skip
    return dq, dk, dv


def _reach(sequences: Sequences, options: Options) -> tuple[bool, int, int]:
    """Whether the mask is the causal one, and how far a query sees to the left and to the right."""
    if options.window is None:
        return sequences.is_causal, -1, -1
    return False, options.window - 1, 0


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Without this switch PyTorch's kernel adds up the gradient of the queries in any order."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor]:
    """In the dtype of sums."""
    dtype = accumulation_dtype(q.dtype)
    out = q.new_empty(*q.shape[:2], v.shape[2], dtype=dtype)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=dtype)
    for queries, keys in sequences.slices():
        scores = _scores(q[queries], k[keys], options)
        scores = scores.masked_fill(~_visible(scores, sequences, options), -torch.inf)
        lse[:, queries] = scores.logsumexp(-1)
        values = _heads(v[keys], q.shape[1])
        out[queries] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out, lse


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulation_dtype(q.dtype)
    dq, dk, dv = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
    num_heads = q.shape[1]
    for queries, keys in sequences.slices():
        scores = _scores(q[queries], k[keys], options)
        probs = torch.exp(scores - lse[:, queries, None])
        probs = probs * _visible(scores, sequences, options)
        grads, outs = _heads(grad[queries], num_heads), _heads(out[queries], num_heads)
        deltas = (grads * outs).sum(-1, keepdim=True)
        slopes = probs * (grads @ _heads(v[keys], num_heads).mT - deltas) * options.scale
        if options.softcap is not None:
            slopes = slopes * (1 - (scores / options.softcap).square())
        dq[queries] = (slopes @ _heads(k[keys], num_heads)).transpose(0, 1)
        dk[keys] = _group_sums(slopes.mT @ _heads(q[queries], num_heads), k.shape[1])
        dv[keys] = _group_sums(probs.mT @ grads, k.shape[1])
    return dq, dk, dv


def _scores(queries: Tensor, keys: Tensor, options: Options) -> Tensor:
    """(H, queries, keys) scores before anything is hidden."""
    num_heads = queries.shape[1]
    scores = _heads(queries, num_heads) @ _heads(keys, num_heads).mT * options.scale
    if options.softcap is None:
        return scores
    return options.softcap * torch.tanh(scores / options.softcap)


def _visible(scores: Tensor, sequences: Sequences, options: Options) -> Tensor:
    """(queries, keys) bool: which keys a query sees."""
    visible = scores.new_ones(scores.shape[1:], dtype=torch.bool)
    if sequences.is_causal:
        visible = visible.tril()
    if options.window is not None:
        visible = visible.triu(1 - options.window)
    return visible


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(H, tokens, K) in the dtype of sums, heads repeated where several queries share one."""
    x = x.to(accumulation_dtype(x.dtype)).transpose(0, 1)
    return x.repeat_interleave(num_heads // x.shape[0], dim=0)


def _group_sums(x: Tensor, num_kv_heads: int) -> Tensor:
    """(tokens, Hkv, K) sums over the heads that share one."""
    return x.unflatten(0, (num_kv_heads, -1)).sum(1).transpose(0, 1)


PLAIN = Flash("plain PyTorch", _plain_forward, _plain_backward)
PYTORCH = Flash("PyTorch's flash attention", _pytorch_forward, _pytorch_backward)
