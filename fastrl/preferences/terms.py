"""What a preference loss returns, and the few functions that all of them share.

Legend: B completions, n pairs, S trained tokens. L is the sum of a completion's log-probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class PairTerms(NamedTuple):
    """(n,) each, one entry a pair; the loss of a step is the mean of `losses`.

    Slopes are derivatives of a pair's own loss with respect to L. A loss that sorts has its terms
    under the number of the chosen completion, where only their sum means anything.
    """

    losses: Tensor
    chosen_slopes: Tensor
    rejected_slopes: Tensor
    companion_slopes: Tensor | None = None  # of the third completion, for losses that have one


class SequenceTerms(NamedTuple):
    """(B,) each, already averaged: the loss is the sum of `losses`, slopes are its d / d L."""

    losses: Tensor
    slopes: Tensor


class SequenceLoss(NamedTuple):
    """A finished loss: nothing is left to weight or to average."""

    loss: Tensor  # 0-dim
    slopes: Tensor  # (S,) derivative with respect to the log-probability of each token


def margins(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
) -> Tensor:  # fmt: skip
    """(n,) how much more than the reference the policy prefers the chosen completion."""
    return (chosen_logps - chosen_ref_logps) - (rejected_logps - rejected_ref_logps)


def of_margins(losses: Tensor, slopes: Tensor) -> PairTerms:
    """Terms of a loss of the margin alone, from its derivative with respect to the margin."""
    return PairTerms(losses, slopes, -slopes)


def logistic(scaled_margins: Tensor, scale: float) -> PairTerms:
    """-log sigmoid(u) for u = scale * margin."""
    return of_margins(
        -functional.logsigmoid(scaled_margins), -scale * torch.sigmoid(-scaled_margins)
    )


def bell(scores: Tensor) -> Tensor:
    """Derivative of the sigmoid, without the cancellation of s (1 - s)."""
    return torch.sigmoid(scores) * torch.sigmoid(-scores)


def with_anchor(terms: PairTerms, losses: Tensor, chosen_slopes: Tensor) -> PairTerms:
    """Terms plus a loss of the chosen completion alone."""
    return terms._replace(
        losses=terms.losses + losses, chosen_slopes=terms.chosen_slopes + chosen_slopes
    )


def require(fits: bool, expected: str, got: object, advice: str) -> None:
    """ValueError unless a hyper-parameter is in its range."""
    if not fits:
        raise ValueError(f"expected {expected}, got {got}; {advice}")
