"""The tokens with the largest scores, sequence by sequence, by sorting."""

import torch
from torch import Tensor


def select_tokens_reference(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float | None = None,
    budget: int | None = None,
    per: str = "batch",
    lengths: Tensor | None = None,
) -> Tensor:
    """`select_tokens` with the same arguments."""
    tokens = torch.arange(scores.numel(), device=scores.device).view(scores.shape)
    sequences = [tokens.flatten()]
    if per == "sequence":
        sequences = list(tokens if lengths is None else tokens.split(lengths.tolist()))
    kept = torch.zeros_like(tokens, dtype=torch.bool).flatten()
    for sequence in sequences:
        candidates = sequence if mask is None else sequence[mask.flatten()[sequence]]
        order = torch.argsort(scores.flatten()[candidates], descending=True, stable=True)
        kept[candidates[order[: number_kept(candidates.numel(), ratio, budget)]]] = True
    return kept.view(scores.shape)


def number_kept(num_candidates: int, ratio: float | None, budget: int | None) -> int:
    """How many of the candidates are kept.

    A ratio is rounded down to whole tokens, but 0.3 * 10 is 3 whatever its last bit says.
    """
    wanted = max(1, int(ratio * num_candidates + 1e-9)) if ratio is not None else budget
    assert wanted is not None
    return min(wanted, num_candidates)
