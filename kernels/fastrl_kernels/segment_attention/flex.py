"""`segment_attention` through PyTorch's FlexAttention: compiled on a GPU, forward only on a CPU.

The mask is a function of two tokens, and a list says which blocks of keys each block of queries
needs: those that are hidden are skipped, those seen whole need no mask. What a block of tokens can
see follows from the smallest and largest numbers in it, so the lists are made without an (N, N)
tensor; FlexAttention itself wants them as (L, L), for L blocks. Compiled kernels are untested on a
GPU.

N packed tokens, L blocks, H heads, Hkv key-value heads, K head size of queries and keys, Kv of
values.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.segments import Segments

BLOCK_SIZE = 128  # FlexAttention's own, a multiple of its kernels' tiles

_cache: WeakKeyDictionary[Segments, dict[int | None, BlockMask]] = WeakKeyDictionary()


@torch.compiler.disable  # the lists follow the row, and the compiled function is one for all rows
def segment_attention_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`segment_attention` of at least one token."""
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            'implementation="flex" has gradients on a GPU only, got tensors that require them on '
            f'{q.device}; use "auto", or torch.no_grad() for the forward pass alone'
        )
    if not q.is_cuda:  # PyTorch refuses what requires gradients, asked for or not
        q, k, v = (x.detach() for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return attend(q, k, v, block_mask_of(segments, window), scale, softcap, sinks)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Outputs (N, H, Kv) in the dtype of q."""
    dtype, sums_dtype = q.dtype, accumulation_dtype(q.dtype)
    if not q.is_cuda:  # where probabilities would be rounded to half precision
        q, k, v = (x.to(sums_dtype) for x in (q, k, v))
    out, statistics = _attention(q.is_cuda)(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        score_mod=_score_mod(q, scale, softcap),
        block_mask=mask,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )
    out = out[0].transpose(0, 1)
    if sinks is not None:  # one of probability p leaves (1 - p) to the keys
        kept = torch.sigmoid(statistics.lse[0].to(sums_dtype) - sinks.to(sums_dtype)[:, None])
        out = out * kept.mT[..., None]
    return out.to(dtype)


def _attention(on_gpu: bool) -> Callable[..., Any]:
    return _compiled_attention() if on_gpu else _eager_attention


@functools.cache
def _compiled_attention() -> Callable[..., Any]:
    """As one graph or not at all: past its limit of recompilations it would go through all scores.

    Lengths are dynamic; heads, head sizes, dtypes and the options in use compile once each.
    """
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _eager_attention(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(*args, **kwargs)


def _score_mod(q: Tensor, scale: float, softcap: float | None) -> Callable[..., Tensor] | None:
    """What becomes of q k / sqrt(K), FlexAttention's scores; None for nothing.

    Its constants are tensors: as numbers they would be symbols where lengths are dynamic, which
    the kernels cannot take, and each value would compile again.
    """
    dtype = accumulation_dtype(q.dtype)
    ratio = scale * q.shape[2] ** 0.5
    if softcap is None and abs(ratio - 1) < 1e-15:
        return None
    factor = torch.full((), ratio / (softcap or 1.0), dtype=dtype, device=q.device)

    def scaled(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score * factor

    if softcap is None:
        return scaled
    cap = torch.full((), softcap, dtype=dtype, device=q.device)

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score * factor)

    return capped


def block_mask_of(segments: Segments, window: int | None) -> BlockMask:
    """The mask of a forest; kept for the next layer as long as the forest lives."""
    known = _cache.setdefault(segments, {})
    if window not in known:
        # Lists made under inference mode could not be used in the backward of the update.
        with torch.inference_mode(False):
            known[window] = make_block_mask(segments, window)
    return known[window]


def make_block_mask(
    segments: Segments, window: int | None, block_size: int = BLOCK_SIZE
) -> BlockMask:
    """The mask of a forest with at least one token."""
    num_tokens, ends = segments.num_tokens, segments.ends
    positions = segments.positions.to(torch.int32)
    # For each query, not as one number, which would compile the mask again for every window.
    farthest = positions - (num_tokens if window is None else window - 1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key]) & (positions[key] >= farthest[query])

    some, every = block_pairs(ends, positions, farthest, block_size)
    return BlockMask.from_kv_blocks(
        *_lists(some & ~every),
        *_lists(every),
        BLOCK_SIZE=block_size,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )


def block_pairs(
    ends: Tensor, positions: Tensor, farthest: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """(L, L) bool twice: may a query of the row's block see a key of the column's; do all see all.

    All (N,) int32; farthest: the smallest position that a query sees.
    """
    (first_end, last_end), (low, high), (nearest, latest) = (
        _range(x, block_size) for x in (ends, farthest, positions)
    )
    first = torch.arange(last_end.shape[0], device=ends.device) * block_size
    last = first + block_size - 1  # past all ends in an incomplete block, which is never seen whole
    may = (first <= last[:, None]) & (first[:, None] < last_end) & (latest >= low[:, None])
    all_see = (last < first[:, None]) & (last[:, None] < first_end) & (nearest >= high[:, None])
    return may, all_see


def _range(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(L,) smallest and (L,) largest number in every block of an (N,) tensor."""
    num_missing = -x.shape[0] % block_size
    blocks = torch.cat([x, x[-1:].expand(num_missing)]).view(-1, block_size)
    return blocks.amin(1), blocks.amax(1)


def _lists(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, L) number of keys' blocks for each block of queries, and (1, 1, L, L) which ones."""
    order = pairs.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return pairs.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()
