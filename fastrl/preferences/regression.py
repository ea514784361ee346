"""Pair losses that fit a log-ratio to a number: squared errors and their gradients.

Legend: n pairs. All inputs are (n,) and detached. Sums of log-probabilities: `ref` is the frozen
reference, `old` the policy at the start of the update (or of the round, for self-play).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.preferences.terms import PairTerms, margins, of_margins, require


def ipo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    chosen_lengths: Tensor, rejected_lengths: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """Squared error of the margin of mean log-ratios to 1 / (2 beta) (IPO, arXiv:2310.12036).

    The derivation has sums, `ipo_sum`; its authors told TRL that means are intended.
    """
    chosen = (chosen_logps - chosen_ref_logps) / chosen_lengths
    errors = chosen - (rejected_logps - rejected_ref_logps) / rejected_lengths - 0.5 / beta
    return PairTerms(errors.square(), 2 * errors / chosen_lengths, -2 * errors / rejected_lengths)


def ipo_sum(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """Squared error of the margin of summed log-ratios to 1 / (2 beta) (IPO, arXiv:2310.12036)."""
    margin = margins(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    return _squared(margin - 0.5 / beta)


def sppo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor, *, eta: float = 1000.0,
) -> PairTerms:  # fmt: skip
    """Half the squared errors of both log-ratios to +-eta / 2 (SPPO, arXiv:2405.00675).

    These are hard labels: the chosen always wins. `win_rate_sppo` takes estimated win rates.
    """
    half = torch.full_like(chosen_logps, 0.5)
    return general_preference(
        chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps, half, -half, eta=eta
    )


def win_rate_sppo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, eta: float = 1000.0,
) -> PairTerms:  # fmt: skip
    """SPPO towards eta (P - 1/2), the rewards P in [0, 1] being win rates (arXiv:2405.00675)."""
    return general_preference(
        chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps,
        chosen_rewards - 0.5, rejected_rewards - 0.5, eta=eta,
    )  # fmt: skip


def general_preference(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, eta: float = 1000.0,
) -> PairTerms:  # fmt: skip
    """Half the squared errors of both log-ratios to eta * reward (GPO, arXiv:2410.02197).

    The reward is the mean preference score of a completion over its opponents, 0 for a draw.
    """
    chosen = chosen_logps - chosen_ref_logps - eta * chosen_rewards
    rejected = rejected_logps - rejected_ref_logps - eta * rejected_rewards
    return PairTerms((chosen.square() + rejected.square()) / 2, chosen, rejected)


def inpo(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    chosen_old_logps: Tensor, rejected_old_logps: Tensor,
    *, eta: float = 7.5e-3, tau: float = 2.5e-3,
) -> PairTerms:  # fmt: skip
    """IPO against the mixture ref^(tau / eta) old^(1 - tau / eta) (INPO, arXiv:2407.00617).

    The margin of sums is fitted to 1 / (2 eta); old is the policy that this round started from.
    """
    require(0 <= tau <= eta, f"tau of INPO in [0, eta = {eta}]", tau, "tau / eta is a proportion")
    share = tau / eta
    anchors = share * (chosen_ref_logps - rejected_ref_logps)
    anchors = anchors + (1 - share) * (chosen_old_logps - rejected_old_logps)
    return _squared(chosen_logps - rejected_logps - anchors - 0.5 / eta)


def rebel(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_old_logps: Tensor, rejected_old_logps: Tensor,
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, eta: float = 1.0,
) -> PairTerms:  # fmt: skip
    """Squared error of the log-ratio gap to eta times the reward gap (REBEL, arXiv:2404.16767).

    It needs no better and worse: "chosen" is the first of two completions. With only the tokens of
    one turn trained and rewards that are the return from that turn it is REFUEL (2410.04612).
    """
    gaps = margins(chosen_logps, rejected_logps, chosen_old_logps, rejected_old_logps)
    return _squared(gaps - eta * (chosen_rewards - rejected_rewards))


def contrastive_policy_gradient(
    chosen_logps: Tensor, rejected_logps: Tensor,
    chosen_ref_logps: Tensor, rejected_ref_logps: Tensor,
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, beta: float = 0.1,
) -> PairTerms:  # fmt: skip
    """-sg[R_1 - R_2] (L_1 - L_2), R = r - beta log(policy / ref) (CoPG, arXiv:2406.19185).

    The two completions may come from any policy and in any order. The mean over every two of a
    group of G is the form with a baseline: 2 / G of the leave-one-out policy gradient.
    """
    gaps = margins(chosen_logps, rejected_logps, chosen_ref_logps, rejected_ref_logps)
    weights = chosen_rewards - rejected_rewards - beta * gaps
    return of_margins(-weights * (chosen_logps - rejected_logps), -weights)


def _squared(errors: Tensor) -> PairTerms:
    return of_margins(errors.square(), 2 * errors)
