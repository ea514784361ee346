"""`fastrl::select_tokens`: a radix select on a GPU, thresholds on a CPU, a stable sort anywhere.

S tokens, B sequences, C the longest of them. Nothing waits for a GPU.
"""

import torch
from torch import Tensor

from fastrl_kernels.implementation import interprets_triton, on_device

BLOCK, MAX_PROGRAMS, NUM_WARPS = 2048, 128, 8
INTERPRETED_BLOCK, INTERPRETED_PROGRAMS = 32, 8
BLOCKS_PER_PROGRAM = 4  # at least, until a sequence has all the programs that it may have
NUM_DIGITS = 256
NUM_PASSES = 4  # of 8 bits each, over float32


@torch.library.custom_op("fastrl::select_tokens", mutates_args=())
def select_tokens_op(
    scores: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    ratio: float | None,
    budget: int | None,
    implementation: str,
) -> Tensor:
    """(S,) bool; sequences of the given lengths, one of all tokens where there are none."""
    bounds = _bounds(lengths, scores)
    if implementation == "triton":
        with on_device(scores):
            return _launch(scores, mask, bounds, ratio, budget)
    if scores.device.type == "cpu":
        return by_thresholds(scores, mask, bounds, ratio, budget)
    return by_sorting(scores, mask, bounds, ratio, budget)


@select_tokens_op.register_fake
def _(scores: Tensor, *_: object) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _bounds(lengths: Tensor | None, scores: Tensor) -> Tensor:
    """(B + 1,) int64: sequence b is the tokens from bounds[b] to before bounds[b + 1]."""
    num_tokens = scores.shape[0]
    if lengths is None:
        return torch.arange(2, device=scores.device) * num_tokens
    if not lengths.is_cuda and (int(lengths.sum()) != num_tokens or bool((lengths < 0).any())):
        raise ValueError(
            f"expected lengths that sum up to the {num_tokens} scores, none negative, got the sum "
            f"{int(lengths.sum())}; give the tokens of every sequence, masked ones included"
        )
    ends = lengths.cumsum(0).clamp(0, num_tokens)
    return torch.cat([ends.new_zeros(1), ends])


def by_sorting(
    scores: Tensor, mask: Tensor | None, bounds: Tensor, ratio: float | None, budget: int | None
) -> Tensor:
    """Sorts by score, then by sequence, and keeps the first of each."""
    num_sequences = bounds.shape[0] - 1
    place = torch.arange(scores.shape[0], device=scores.device)
    # Tokens of no sequence, and those that the mask forbids, are behind the last.
    owner = torch.searchsorted(bounds[1:], place, right=True)
    if mask is not None:
        owner = torch.where(mask, owner, num_sequences)
    order = torch.argsort(scores + 0.0, descending=True, stable=True)  # -0 + 0 is 0
    order = order[torch.argsort(owner[order], stable=True)]
    owner = owner[order]
    first = torch.searchsorted(owner, torch.arange(num_sequences + 1, device=scores.device))
    num_kept = _numbers_kept(first.diff(), ratio, budget)
    num_kept = torch.cat([num_kept, num_kept.new_zeros(1)])
    kept = torch.empty_like(scores, dtype=torch.bool)
    kept[order] = place - first[owner] < num_kept[owner]
    return kept


def by_thresholds(
    scores: Tensor, mask: Tensor | None, bounds: Tensor, ratio: float | None, budget: int | None
) -> Tensor:
    """The smallest score that is kept of each sequence, all above it, and the first that equal it.

    Sequences stand below each other, filled up with keys that nothing is kept of.
    """
    lengths = bounds.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    if longest == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    keys = _ordered_keys(scores, mask)
    nothing = torch.iinfo(keys.dtype).min
    is_token = torch.arange(longest) < lengths[:, None]  # (B, C)
    if bool(is_token.all()):
        rows = keys.view(-1, longest)
    else:
        rows = keys.new_full(is_token.shape, nothing)
        rows[is_token] = keys
    num_kept = _numbers_kept((rows != nothing).sum(1), ratio, budget)[:, None]
    if len(rows) == 1:
        rank = longest + 1 - int(num_kept.clamp(min=1))
        thresholds = rows.kthvalue(rank, dim=1, keepdim=True).values
    else:
        ordered = rows.sort(dim=1, descending=True).values
        thresholds = ordered.gather(1, num_kept.clamp(min=1) - 1)
    above, ties = rows > thresholds, rows == thresholds
    ties &= ties.cumsum(1, dtype=torch.int32) <= num_kept - above.sum(1, keepdim=True)
    kept = (above | ties) & (num_kept > 0)
    return kept[is_token]


def _ordered_keys(scores: Tensor, mask: Tensor | None) -> Tensor:
    """(S,) integers in the order of the scores, NaN the largest; the smallest of all where masked.

    Bits of a float are in its order, those of negative ones in the opposite.
    """
    values = scores.float() if scores.dtype.itemsize < 4 else scores
    integer = torch.int32 if values.dtype.itemsize == 4 else torch.int64
    bits = (values + 0.0).view(integer)  # -0 + 0 is 0
    info = torch.iinfo(integer)
    keys = torch.where(bits < 0, bits ^ info.max, bits).masked_fill_(values.isnan(), info.max)
    return keys if mask is None else keys.masked_fill_(~mask, info.min)


def _numbers_kept(counts: Tensor, ratio: float | None, budget: int | None) -> Tensor:
    """`number_kept` of every sequence, (B,) int64."""
    if ratio is None:
        return counts.clamp(max=budget)
    wanted = (ratio * counts.double() + 1e-9).long().clamp(min=1)
    return torch.minimum(wanted, counts)


def _launch(
    scores: Tensor, mask: Tensor | None, bounds: Tensor, ratio: float | None, budget: int | None
) -> Tensor:
    """Five launches, and no number of tokens or sequences builds another kernel."""
    from fastrl_kernels.token_selection.kernel import count_digits_kernel, keep_kernel

    num_tokens, num_sequences = scores.shape[0], bounds.shape[0] - 1
    kept = torch.zeros_like(scores, dtype=torch.bool)
    if num_tokens == 0 or num_sequences == 0:
        return kept
    block, max_programs = BLOCK, MAX_PROGRAMS
    if interprets_triton():
        block, max_programs = INTERPRETED_BLOCK, INTERPRETED_PROGRAMS
    tokens_per_program = num_sequences * block * BLOCKS_PER_PROGRAM
    num_programs = min(max_programs, -(-num_tokens // tokens_per_program))
    counts = bounds.new_empty((2, num_sequences, num_programs, NUM_DIGITS), dtype=torch.int32)
    state = bounds.new_empty((NUM_PASSES, num_sequences, 2), dtype=torch.int32)
    share = None if ratio is None else scores.new_full((1,), ratio, dtype=torch.float64)
    most = num_tokens if budget is None else min(budget, num_tokens)
    settings = {
        "HAS_MASK": mask is not None, "HAS_RATIO": ratio is not None, "BLOCK": block,
        "num_warps": NUM_WARPS,
    }  # fmt: skip
    grid = (num_sequences, num_programs)
    mask = None if mask is None else mask.contiguous()
    shared = (scores.contiguous(), mask, bounds, share, counts, state)
    for level in range(NUM_PASSES):
        count_digits_kernel[grid](*shared, most, level, **settings)
    keep_kernel[grid](*shared, kept, most, MAX_PROGRAMS=max_programs, **settings)
    return kept
