"""Pair losses of the margin between two completions: DPO and its relatives.

Legend: n pairs. All inputs are (n,) and detached: sums of log-probabilities over the completion,
under the policy and under the reference. The margin is u = beta ((L_w - ref_w) - (L_l - ref_l)).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.preferences.terms import PairTerms, bell, logistic, margins, of_margins, require

EXPONENT_LIMIT = 20.0
"""Scaled margins below minus this are constant inside an exponential."""


def dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """-log sigmoid(u) (DPO, arXiv:2305.18290)."""
    margin = margins(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    return logistic(beta * margin, beta)


def conservative_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    *, beta: float = 0.1, label_smoothing: float = 0.1,
) -> PairTerms:  # fmt: skip
    """DPO when a fraction of the labels is flipped (cDPO, Mitchell 2023)."""
    u = beta * margins(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    losses = -(1 - label_smoothing) * logsigmoid(u) - label_smoothing * logsigmoid(-u)
    return of_margins(losses, beta * (label_smoothing - torch.sigmoid(-u)))


def robust_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    *, beta: float = 0.1, label_smoothing: float = 0.1,
) -> PairTerms:  # fmt: skip
    """DPO made unbiased under flipped labels (robust DPO, arXiv:2403.00409)."""
    require(
        0 <= label_smoothing < 0.5, "label_smoothing of robust DPO in [0, 0.5)", label_smoothing,
        "labels that are wrong half of the time say nothing",
    )  # fmt: skip
    u = beta * margins(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    right, wrong = 1 - label_smoothing, label_smoothing
    scale = 1 - 2 * label_smoothing
    losses = (wrong * logsigmoid(-u) - right * logsigmoid(u)) / scale
    slopes = -beta * (right * torch.sigmoid(-u) + wrong * torch.sigmoid(u)) / scale
    return of_margins(losses, slopes)


def soft_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """Cross-entropy of sigmoid(u) with q = sigmoid(r_w - r_l) (DNO, arXiv:2404.03715).

    Rewards far apart make it DPO. Where a judge gives q itself, its logit is the reward difference.
    """
    u = beta * margins(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    q = torch.sigmoid(chosen_rewards - rejected_rewards)
    doubt = torch.sigmoid(rejected_rewards - chosen_rewards)
    losses = -q * logsigmoid(u) - doubt * logsigmoid(-u)
    return of_margins(losses, beta * (doubt - torch.sigmoid(-u)))


def hinge(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, beta: float = 0.05,
) -> PairTerms:  # fmt: skip
    """max(0, 1 - u) (hinge-norm of RSO, arXiv:2309.06657)."""
    u = beta * margins(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    return of_margins((1 - u).clamp(min=0), -beta * (u < 1).to(u.dtype))


def exo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    *, beta: float = 0.5, label_smoothing: float = 1e-3,
) -> PairTerms:  # fmt: skip
    """Reverse KL from (sigmoid(u), sigmoid(-u)) to smoothed labels (EXO, arXiv:2402.00856)."""
    require(
        0 < label_smoothing < 1, "label_smoothing of EXO in (0, 1)", label_smoothing,
        "hard labels make its divergence infinite",
    )  # fmt: skip
    u = beta * margins(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    labels = u.new_tensor([1 - label_smoothing, label_smoothing]).log()
    losses = torch.sigmoid(u) * (logsigmoid(u) - labels[0])
    losses = losses + torch.sigmoid(-u) * (logsigmoid(-u) - labels[1])
    return of_margins(losses, beta * bell(u) * (u - (labels[0] - labels[1])))


def discopop(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    *, beta: float = 0.05, temperature: float = 0.05,
) -> PairTerms:  # fmt: skip
    """Logistic and exponential loss mixed by m = sigmoid(u / temperature) (arXiv:2406.08414).

    It is not convex: around u = 0 the mixture moves faster than the losses.
    """
    u = beta * margins(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    mix, mix_slope = torch.sigmoid(u / temperature), bell(u / temperature) / temperature
    exponential = (-u.clamp(min=-EXPONENT_LIMIT)).exp()
    rest = torch.sigmoid(-u / temperature)
    losses = mix * exponential - rest * logsigmoid(u)
    slopes = mix_slope * (logsigmoid(u) + exponential) - rest * torch.sigmoid(-u)
    slopes = slopes - torch.where(u >= -EXPONENT_LIMIT, mix * exponential, 0)
    return of_margins(losses, beta * slopes)


def weighted_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    chosen_alignments: Tensor, rejected_alignments: Tensor, *, beta: float = 0.01,
) -> PairTerms:  # fmt: skip
    """DPO with each pair weighted by how likely the policy makes it (WPO, arXiv:2406.11827).

    The alignment of a completion is the mean over its tokens of logp - log(sum of p^2); the weight
    min(1, exp(sum of both)) is a constant of the step.
    """
    terms = dpo(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps, beta=beta)
    weights = (chosen_alignments + rejected_alignments).clamp(max=0).exp()
    return of_margins(weights * terms.losses, weights * terms.chosen_slopes)


def sorted_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """DPO on log-ratios paired by rank over all pairs of the step (AOT, arXiv:2406.05882).

    The k-th smallest log-ratio of the chosen completions meets the k-th smallest of the rejected
    ones, so that one distribution comes to dominate the other.
    """
    chosen, rejected = chosen_logps - chosen_ref_logps, rejected_logps - rejected_ref_logps
    order = torch.argsort(chosen, stable=True)
    other_order = torch.argsort(rejected, stable=True)
    terms = logistic(beta * (chosen[order] - rejected[other_order]), beta)
    rank, other_rank = torch.argsort(order), torch.argsort(other_order)
    return PairTerms(
        terms.losses[rank], terms.chosen_slopes[rank], terms.rejected_slopes[other_rank]
    )


def sorted_margin_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """DPO on the policy's margins against the reference's of the same rank (paired AOT)."""
    margin, ref_margin = chosen_logps - rejected_logps, chosen_ref_logps - rejected_ref_logps
    order = torch.argsort(margin, stable=True)
    terms = logistic(beta * (margin[order] - ref_margin.sort().values), beta)
    rank = torch.argsort(order)
    return of_margins(terms.losses[rank], terms.chosen_slopes[rank])
