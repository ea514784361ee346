"""DPO under other divergences than the reverse KL (f-DPO, arXiv:2309.16240).

Legend: n pairs. All inputs are (n,) and detached. The score of a completion is beta f'(exp delta)
with delta its summed log-ratio to the reference; for the reverse KL that is delta itself and the
loss is `dpo`. Where delta goes into an exponential it is clamped to [-10, 20].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.preferences.terms import PairTerms, require

MIN_LOG_RATIO = -10.0
MAX_LOG_RATIO = 20.0


def forward_kl_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """Scores -exp(-delta), of the forward KL."""
    chosen, chosen_chain = _power(chosen_logps - chosen_ref_logps, -1.0)
    rejected, rejected_chain = _power(rejected_logps - rejected_ref_logps, -1.0)
    return _of_scores(chosen, chosen_chain, rejected, rejected_chain, beta)


def jensen_shannon_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """Scores log sigmoid(delta), of the Jensen-Shannon divergence; its log 2 drops out."""
    chosen, rejected = chosen_logps - chosen_ref_logps, rejected_logps - rejected_ref_logps
    return _of_scores(
        logsigmoid(chosen), torch.sigmoid(-chosen),
        logsigmoid(rejected), torch.sigmoid(-rejected), beta,
    )  # fmt: skip


def alpha_divergence_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    *, beta: float = 0.1, alpha: float = 0.5,
) -> PairTerms:  # fmt: skip
    """Scores exp((alpha - 1) delta) / (alpha - 1), TRL's parameter; 1 - alpha is the authors'."""
    require(alpha != 1, "alpha other than 1", alpha, "at 1 the divergence is the KL of dpo")
    chosen, chosen_chain = _power(chosen_logps - chosen_ref_logps, alpha - 1)
    rejected, rejected_chain = _power(rejected_logps - rejected_ref_logps, alpha - 1)
    return _of_scores(chosen, chosen_chain, rejected, rejected_chain, beta)


def _power(log_ratios: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """exp(power * delta) / power and its derivative, zero outside the clamp."""
    clamped = log_ratios.clamp(MIN_LOG_RATIO, MAX_LOG_RATIO)
    exponential = (power * clamped).exp()
    return exponential / power, torch.where(clamped == log_ratios, exponential, 0)


def _of_scores(
    chosen: Tensor, chosen_chain: Tensor, rejected: Tensor, rejected_chain: Tensor, beta: float
) -> PairTerms:
    u = beta * (chosen - rejected)
    slopes = -beta * torch.sigmoid(-u)
    return PairTerms(-logsigmoid(u), slopes * chosen_chain, -slopes * rejected_chain)
