"""Which tokens to keep: those with the largest scores, of the batch or of each sequence."""

import torch
from torch import Tensor

from fastrl_kernels.implementation import choose_implementation
from fastrl_kernels.token_selection.op import select_tokens_op
from fastrl_kernels.token_selection.reference import select_tokens_reference

__all__ = ["select_tokens", "select_tokens_reference"]


def select_tokens(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float | None = None,
    budget: int | None = None,
    per: str = "batch",
    lengths: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Bool in the shape of `scores`: the largest of those that the mask allows.

    scores: (S,) or (B, C), floating point. Of equal scores the earlier token is kept, and -0 equals
    0. NaN counts above all else, as in torch.topk: it is kept, and shows in the loss.
    mask: bool in the same shape, the tokens that may be kept; None for all.
    ratio: share of these in (0, 1]; whole tokens, and one at least where there are any.
    budget: or so many of them, all where there are fewer.
    per: "batch", or "sequence" to count in each of B sequences: the rows of (B, C) scores, or of
    (S,) scores as many tokens as its entry of `lengths` (B,) int64 says, one sequence behind the
    other. A GPU does not check the lengths; tokens behind the last sequence are not kept there.
    """
    implementation = choose_implementation(implementation, scores)
    _check_amount(ratio, budget)
    _check_tensors(scores, mask)
    _check_sequences(scores, per, lengths)
    if per == "sequence" and lengths is None:
        num_sequences, size = scores.shape
        lengths = torch.full((num_sequences,), size, device=scores.device)
    flat_mask = None if mask is None else mask.reshape(-1)
    flat = scores.detach().reshape(-1)
    return select_tokens_op(flat, flat_mask, lengths, ratio, budget, implementation).view(
        scores.shape
    )


def _check_amount(ratio: float | None, budget: int | None) -> None:
    if (ratio is None) == (budget is None):
        raise ValueError(
            f"expected either ratio or budget, got ratio={ratio} and budget={budget}; ratio=0.2 "
            "keeps a fifth of the tokens, budget=100 a hundred of them"
        )
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}; 0.2 keeps a fifth of the tokens")
    if budget is not None and (isinstance(budget, bool | float) or budget < 1):
        raise ValueError(
            f"budget must be a whole number of tokens of at least 1, got {budget!r}; raise it, or "
            "give a ratio"
        )


def _check_tensors(scores: Tensor, mask: Tensor | None) -> None:
    if not scores.is_floating_point() or scores.dim() not in (1, 2):
        raise ValueError(
            f"scores must be floating point of shape (S,) or (B, C), got {scores.dtype} of shape "
            f"{tuple(scores.shape)}; flatten them, or convert with .float()"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != scores.shape or mask.device != scores.device:
        raise ValueError(
            f"mask must be torch.bool of shape {tuple(scores.shape)} on {scores.device}, got "
            f"{mask.dtype} of shape {tuple(mask.shape)} on {mask.device}; make it with a comparison"
        )


def _check_sequences(scores: Tensor, per: str, lengths: Tensor | None) -> None:
    if per not in ("batch", "sequence"):
        raise ValueError(f'per must be "batch" or "sequence", got {per!r}')
    if (lengths is not None) != (per == "sequence" and scores.dim() == 1):
        raise ValueError(
            f'expected lengths with (S,) scores and per="sequence", and only there, got scores of '
            f"shape {tuple(scores.shape)}, per={per!r} and lengths "
            f"{None if lengths is None else tuple(lengths.shape)}; rows of (B, C) scores are "
            "sequences already"
        )
    if lengths is None:
        return
    if lengths.dtype != torch.int64 or lengths.dim() != 1 or lengths.device != scores.device:
        raise ValueError(
            f"lengths must be torch.int64 of shape (B,) on {scores.device}, got {lengths.dtype} of "
            f"shape {tuple(lengths.shape)} on {lengths.device}; give the tokens of each sequence"
        )
