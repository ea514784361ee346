"""Pair losses of log-probabilities per token, and those without a reference model.

Legend: n pairs. All inputs are (n,) and detached. Sums of log-probabilities come with the lengths,
so that slopes are with respect to the sum: a factor 1 / T where a mean is meant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.preferences.terms import PairTerms, logistic, of_margins, with_anchor

MAX_MEAN_LOGP = -1e-6
"""Odds are taken of probabilities below exp of this, so that they stay finite."""


def simpo(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor,
    *, beta: float = 2.0, margin: float = 1.0,
) -> PairTerms:  # fmt: skip
    """-log sigmoid(beta (mean_w - mean_l) - margin) (SimPO, arXiv:2405.14734).

    The margin is gamma of the paper, not gamma / beta.
    """
    gaps = chosen_logps / chosen_lengths - rejected_logps / rejected_lengths
    return _per_token(logistic(beta * gaps - margin, beta), chosen_lengths, rejected_lengths)


def normalised_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    chosen_lengths: Tensor, rejected_lengths: Tensor, *, beta: float = 5.0,
) -> PairTerms:  # fmt: skip
    """DPO on mean log-ratios per token (Tulu 3, arXiv:2411.15124)."""
    chosen = (chosen_logps - chosen_ref_logps) / chosen_lengths
    rejected = (rejected_logps - rejected_ref_logps) / rejected_lengths
    terms = logistic(beta * (chosen - rejected), beta)
    return _per_token(terms, chosen_lengths, rejected_lengths)


def cpo(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor,
    *, beta: float = 0.1, sft_coef: float = 1.0,
) -> PairTerms:  # fmt: skip
    """-log sigmoid(beta (L_w - L_l)) - sft_coef * mean_w (CPO, arXiv:2401.08417)."""
    terms = logistic(beta * (chosen_logps - rejected_logps), beta)
    per_token = -sft_coef / chosen_lengths.to(chosen_logps.dtype)
    return with_anchor(terms, per_token * chosen_logps, per_token)


def orpo(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor,
    *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """-mean_w - beta log sigmoid(difference of log odds) (ORPO, arXiv:2403.07691).

    The odds are those of the geometric mean probability of a token.
    """
    chosen, chosen_chain = _log_odds(chosen_logps / chosen_lengths)
    rejected, rejected_chain = _log_odds(rejected_logps / rejected_lengths)
    terms = logistic(chosen - rejected, 1.0)
    losses = beta * terms.losses - chosen_logps / chosen_lengths
    chosen_slopes = beta * terms.chosen_slopes * chosen_chain - 1
    rejected_slopes = beta * terms.rejected_slopes * rejected_chain
    return _per_token(
        PairTerms(losses, chosen_slopes, rejected_slopes), chosen_lengths, rejected_lengths
    )


def slic(
    chosen_logps: Tensor, rejected_logps: Tensor, companion_logps: Tensor,
    *, margin: float = 1.0, sft_coef: float = 0.01,
) -> PairTerms:  # fmt: skip
    """max(0, margin - L_w + L_l) - sft_coef L of the fine-tuning target (SLiC, arXiv:2305.10425).

    The companion of a pair is the target of supervised fine-tuning for its prompt.
    """
    gaps = margin - chosen_logps + rejected_logps
    terms = of_margins(gaps.clamp(min=0), -(gaps > 0).to(gaps.dtype))
    return terms._replace(
        losses=terms.losses - sft_coef * companion_logps,
        companion_slopes=torch.full_like(companion_logps, -sft_coef),
    )


def _per_token(terms: PairTerms, chosen_lengths: Tensor, rejected_lengths: Tensor) -> PairTerms:
    """Slopes with respect to sums from slopes with respect to means."""
    return terms._replace(
        chosen_slopes=terms.chosen_slopes / chosen_lengths,
        rejected_slopes=terms.rejected_slopes / rejected_lengths,
    )


def _log_odds(mean_logps: Tensor) -> tuple[Tensor, Tensor]:
    """log(p / (1 - p)) of p = exp(mean logp) and its derivative, zero where p is clamped."""
    clamped = mean_logps.clamp(max=MAX_MEAN_LOGP)
    # Either form of log(1 - p) loses all its digits on the other's side of log 1/2.
    log_rest = torch.where(
        clamped > -0.693, (-torch.expm1(clamped)).log(), torch.log1p(-clamped.exp())
    )
    slopes = -1.0 / torch.expm1(clamped)
    return clamped - log_rest, torch.where(mean_logps <= MAX_MEAN_LOGP, slopes, 0)
