"""Scores, probabilities and slopes of tiles: the arithmetic of attention in plain PyTorch.

H heads, Hkv key-value heads, K head size of queries and keys, Kv of values. B tiles of T tokens
each have R = T * H / Hkv rows for each key-value head, and L keys; X = B * Hkv. Rows of a head lie
in the order of tokens, then of the heads that share its keys. All in the dtype of sums.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.chunks import softcap_slope_


class Options(NamedTuple):
    """Constants of the scores."""

    scale: float
    window: int | None
    softcap: float | None


class Rows(NamedTuple):
    """What the probabilities of tiles and their gradients are made of."""

    queries: Tensor  # (X, R, K)
    keys: Tensor  # (X, L, K)
    values: Tensor  # (X, L, Kv)
    num_tiles: int  # B
    num_tokens: int  # T
    sinks: Tensor | None  # (H,)
    hide: Callable[[Tensor], None]
    """Puts -inf on what is not seen, in scores of shape (B, Hkv, T, H / Hkv, L)."""

    def by_token(self, x: Tensor) -> Tensor:
        """(X, R, size) as (B, Hkv, T, H / Hkv, size), the same memory."""
        num_kv_heads = x.shape[0] // self.num_tiles
        return x.view(self.num_tiles, num_kv_heads, self.num_tokens, -1, x.shape[2])


class Slopes(NamedTuple):
    """Derivatives of the loss."""

    probs: Tensor  # (X, R, L), no derivative: the probabilities, which gradients of values need
    scores: Tensor  # (X, R, L)
    sinks: Tensor | None  # (H,)


def attend(rows: Rows, options: Options) -> Tensor:
    """(X, R, Kv) outputs."""
    probs, _ = _probs(rows, _scores(rows, options))
    return torch.bmm(probs, rows.values)


def slopes_of(rows: Rows, outs: Tensor, grads_out: Tensor, options: Options) -> Slopes:
    """Those of `attend`, from its outputs (X, R, Kv) and their gradients."""
    scores = _scores(rows, options)
    cap_slopes = None
    if options.softcap is not None:
        cap_slopes = softcap_slope_(scores.clone(), options.softcap)
    probs, sink_probs = _probs(rows, scores)
    deltas = (grads_out * outs).sum(-1, keepdim=True)
    sinks_grad = None
    if sink_probs is not None:
        sinks_grad = -rows.by_token(sink_probs * deltas).sum((0, 2)).flatten()
    slopes = torch.bmm(grads_out, rows.values.mT).sub_(deltas).mul_(probs)
    if cap_slopes is not None:
        slopes.mul_(cap_slopes)
    return Slopes(probs, slopes, sinks_grad)


def _scores(rows: Rows, options: Options) -> Tensor:
    """(X, R, L) scores before anything is hidden."""
    scores = rows.queries.new_empty(*rows.queries.shape[:2], rows.keys.shape[1])
    scores.baddbmm_(rows.queries, rows.keys.mT, beta=0, alpha=options.scale)
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_().mul_(options.softcap)
    return scores


def _probs(rows: Rows, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """(X, R, L) probabilities, and (X, R, 1) of the sinks if there are any; uses scores up."""
    tiled = rows.by_token(scores)
    rows.hide(tiled)
    if rows.sinks is None:
        return torch.softmax(scores, -1), None
    sink = rows.sinks.to(scores.dtype).view(1, tiled.shape[1], 1, -1)
    sink = sink.expand(tiled.shape[:4]).reshape(*scores.shape[:2], 1)
    probs = torch.cat([scores, sink], -1).softmax(-1)
    return probs[..., :-1], probs[..., -1:]
