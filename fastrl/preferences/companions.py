"""Pair losses with a third completion of the same prompt: a rationale or a sample of one's own.

Legend: n pairs. All inputs are (n,) and detached, sums of log-probabilities over a completion; the
companion is in no pair itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.preferences.averaged import orpo
from fastrl.preferences.logistic import dpo
from fastrl.preferences.terms import PairTerms, logistic, margins


def rationale_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    companion_logps: Tensor, companion_lengths: Tensor, *, beta: float = 0.1, gamma: float = 1.0,
) -> PairTerms:  # fmt: skip
    """DPO plus gamma times the mean -logp of the reason for the preference (arXiv:2407.14477)."""
    terms = dpo(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps, beta=beta)
    return _with_rationale(terms, companion_logps, companion_lengths, gamma)


def rationale_sigmoid_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    companion_logps: Tensor, *, beta: float = 0.1, gamma: float = 1.0,
) -> PairTerms:  # fmt: skip
    """DPO minus log sigmoid(gamma * summed logp of the reason): the authors' released trainer."""
    terms = dpo(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps, beta=beta)
    return terms._replace(
        losses=terms.losses - logsigmoid(gamma * companion_logps),
        companion_slopes=-gamma * torch.sigmoid(-gamma * companion_logps),
    )


def rationale_orpo(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor,
    companion_logps: Tensor, companion_lengths: Tensor, *, beta: float = 0.1, gamma: float = 1.0,
) -> PairTerms:  # fmt: skip
    """ORPO plus gamma times the mean -logp of the reason for the preference (arXiv:2407.14477)."""
    terms = orpo(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta=beta)
    return _with_rationale(terms, companion_logps, companion_lengths, gamma)


def spac(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_old_logps: Tensor, rejected_old_logps: Tensor,
    companion_logps: Tensor, companion_old_logps: Tensor,
    *, beta: float = 0.1, dpo_coef: float = 1.0,
) -> PairTerms:  # fmt: skip
    """Own samples down, data up, plus DPO against the last round (SPAC, arXiv:2406.04274).

    With D the log-ratio to the policy of the last round, beta (D_own - mean D of the pair) +
    dpo_coef * DPO. The companion was sampled by that policy. beta is 1 / eta of the paper; both
    values are our choice.
    """
    own = beta * (companion_logps - companion_old_logps)
    chosen, rejected = chosen_logps - chosen_old_logps, rejected_logps - rejected_old_logps
    margin = margins(chosen_logps, rejected_logps, chosen_old_logps, rejected_old_logps)
    terms = logistic(beta * margin, beta)
    return PairTerms(
        own - 0.5 * beta * (chosen + rejected) + dpo_coef * terms.losses,
        dpo_coef * terms.chosen_slopes - 0.5 * beta,
        dpo_coef * terms.rejected_slopes - 0.5 * beta,
        torch.full_like(companion_logps, beta),
    )


def _with_rationale(
    terms: PairTerms, companion_logps: Tensor, companion_lengths: Tensor, gamma: float
) -> PairTerms:
    per_token = -gamma / companion_lengths.clamp(min=1).to(companion_logps.dtype)
    return terms._replace(
        losses=terms.losses + per_token * companion_logps, companion_slopes=per_token
    )
