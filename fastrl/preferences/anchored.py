"""Pair losses that move each completion against an anchor of its own, not only their margin.

Legend: n pairs. All inputs are (n,) and detached; the score of a completion is beta times its
summed log-ratio to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.preferences.logistic import dpo
from fastrl.preferences.terms import PairTerms, bell, with_anchor


def nca(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, beta: float = 0.01,
) -> PairTerms:  # fmt: skip
    """Noise contrastive alignment: the chosen score is kept from falling (arXiv:2402.05369)."""
    chosen = beta * (chosen_logps - chosen_ref_logps)
    rejected = beta * (rejected_logps - rejected_ref_logps)
    losses = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    chosen_slopes = beta * (0.5 * torch.sigmoid(chosen) - torch.sigmoid(-chosen))
    return PairTerms(losses, chosen_slopes, 0.5 * beta * torch.sigmoid(rejected))


def bco(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    *, beta: float = 0.01, score_baseline: float = 0.0,
) -> PairTerms:  # fmt: skip
    """A binary classifier of chosen and rejected by their scores (BCO, arXiv:2404.04656).

    score_baseline is the running mean of (chosen + rejected score) / 2, a constant of the step.
    """
    chosen = beta * (chosen_logps - chosen_ref_logps) - score_baseline
    rejected = beta * (rejected_logps - rejected_ref_logps) - score_baseline
    losses = -logsigmoid(chosen) - logsigmoid(-rejected)
    return PairTerms(losses, -beta * torch.sigmoid(-chosen), beta * torch.sigmoid(rejected))


def apo_zero(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """Chosen up, rejected down, for data better than the model (APO-zero, arXiv:2408.06266)."""
    chosen = beta * (chosen_logps - chosen_ref_logps)
    rejected = beta * (rejected_logps - rejected_ref_logps)
    losses = torch.sigmoid(-chosen) + torch.sigmoid(rejected)
    return PairTerms(losses, -beta * bell(chosen), beta * bell(rejected))


def apo_down(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """Both down, rejected more, for data worse than the model (APO-down, arXiv:2408.06266)."""
    chosen = beta * (chosen_logps - chosen_ref_logps)
    margin = chosen - beta * (rejected_logps - rejected_ref_logps)
    losses = torch.sigmoid(chosen) + torch.sigmoid(-margin)
    return PairTerms(losses, beta * (bell(chosen) - bell(margin)), beta * bell(margin))


def regularised_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    *, beta: float = 0.01, sft_coef: float = 0.005,
) -> PairTerms:  # fmt: skip
    """DPO minus sft_coef times the summed chosen log-probability (RPO, arXiv:2405.16436)."""
    terms = dpo(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps, beta=beta)
    return with_anchor(terms, -sft_coef * chosen_logps, torch.full_like(chosen_logps, -sft_coef))


def constrained_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, chosen_lengths: Tensor,
    *, beta: float = 0.1, sft_coef: float = 1.0,
) -> PairTerms:  # fmt: skip
    """DPO minus sft_coef times the mean chosen log-probability (CODPO of CGPO, arXiv:2409.20370).

    The paper gives no value for sft_coef; 1 is our choice.
    """
    terms = dpo(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps, beta=beta)
    per_token = -sft_coef / chosen_lengths.to(chosen_logps.dtype)
    return with_anchor(terms, per_token * chosen_logps, per_token)


def exploratory_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    chosen_from_reference: Tensor, rejected_from_reference: Tensor,
    *, beta: float = 0.1, bonus: float = 1e-5,
) -> PairTerms:  # fmt: skip
    """DPO plus bonus * L of the completion that the reference sampled (XPO, arXiv:2405.21046).

    The flags are bool: which of the pair came from the reference and not from the policy. Its
    likelihood is lowered, which drives the policy away from what is known.
    """
    terms = dpo(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps, beta=beta)
    chosen_bonus = bonus * chosen_from_reference.to(chosen_logps.dtype)
    rejected_bonus = bonus * rejected_from_reference.to(chosen_logps.dtype)
    return PairTerms(
        terms.losses + chosen_bonus * chosen_logps + rejected_bonus * rejected_logps,
        terms.chosen_slopes + chosen_bonus,
        terms.rejected_slopes + rejected_bonus,
    )
