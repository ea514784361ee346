"""The losses of preferences by the names that TRL and Liger have for them.

n pairs. Functions of (n,) log-ratios of chosen and rejected completions to the reference, and of
`beta`, in plain PyTorch with autograd; each returns (n,) losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairSettings(NamedTuple):
    """Numbers of the losses; each takes those it has a use for."""

    beta: float
    label_smoothing: float
    discopop_tau: float


def sigmoid(chosen: Tensor, rejected: Tensor, settings: PairSettings) -> Tensor:
    """-log sigmoid(margin) (DPO, arXiv:2305.18290)."""
    return -logsigmoid(settings.beta * (chosen - rejected))


def hinge(chosen: Tensor, rejected: Tensor, settings: PairSettings) -> Tensor:
    """max(0, 1 - margin) (RSO, arXiv:2309.06657)."""
    return (1 - settings.beta * (chosen - rejected)).relu()


def exo_pair(chosen: Tensor, rejected: Tensor, settings: PairSettings) -> Tensor:
    """KL from (sigmoid(margin), sigmoid(-margin)) to smoothed labels (EXO, arXiv:2402.00856)."""
    margins = settings.beta * (chosen - rejected)
    right, wrong = math.log1p(-settings.label_smoothing), math.log(settings.label_smoothing)
    losses = margins.sigmoid() * (logsigmoid(margins) - right)
    return losses + (-margins).sigmoid() * (logsigmoid(-margins) - wrong)


def nca_pair(chosen: Tensor, rejected: Tensor, settings: PairSettings) -> Tensor:
    """Noise contrast of each completion with itself (NCA, arXiv:2402.05369)."""
    good, bad = settings.beta * chosen, settings.beta * rejected
    return -logsigmoid(good) - 0.5 * logsigmoid(-good) - 0.5 * logsigmoid(-bad)


def robust(chosen: Tensor, rejected: Tensor, settings: PairSettings) -> Tensor:
    """DPO without bias under flipped labels (arXiv:2403.00409)."""
    margins, flipped = settings.beta * (chosen - rejected), settings.label_smoothing
    losses = flipped * logsigmoid(-margins) - (1 - flipped) * logsigmoid(margins)
    return losses / (1 - 2 * flipped)


def bco_pair(chosen: Tensor, rejected: Tensor, settings: PairSettings) -> Tensor:
    """A classifier of good and bad completions, without its shift (BCO, arXiv:2404.04656)."""
    return -logsigmoid(settings.beta * chosen) - logsigmoid(-settings.beta * rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, settings: PairSettings) -> Tensor:
    """Squared errors of the log-ratios to +-1 / (2 beta) (SPPO, arXiv:2405.00675)."""
    target = 0.5 / settings.beta
    return (chosen - target).square() + (rejected + target).square()


def apo_zero(chosen: Tensor, rejected: Tensor, settings: PairSettings) -> Tensor:
    """Chosen ones up, rejected ones down (APO, arXiv:2408.06266 equation 7)."""
    return (-settings.beta * chosen).sigmoid() + (settings.beta * rejected).sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor, settings: PairSettings) -> Tensor:
    """Both down, the rejected ones further (APO, arXiv:2408.06266 equation 8)."""
    beta = settings.beta
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def discopop(chosen: Tensor, rejected: Tensor, settings: PairSettings) -> Tensor:
    """Logistic and exponential loss, mixed by the margin (DiscoPOP, arXiv:2406.08414)."""
    margins = settings.beta * (chosen - rejected)
    mix = (margins / settings.discopop_tau).sigmoid()
    return mix * (-margins).exp() - (1 - mix) * logsigmoid(margins)


PAIR_LOSSES: dict[str, Callable[[Tensor, Tensor, PairSettings], Tensor]] = {
    function.__name__: function
    for function in (
        sigmoid,
        hinge,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        apo_zero,
        apo_down,
        discopop,
    )
}


def check_pair_loss(loss_type: str, settings: PairSettings) -> None:
    """Raise ValueError for a loss that is not there, or numbers that it cannot take."""
    if loss_type not in PAIR_LOSSES:
        hint = ", whose means over tokens fastrl.preferences has" if loss_type == "ipo" else ""
        raise ValueError(
            f"loss_type must be one of {', '.join(PAIR_LOSSES)}, got {loss_type!r}{hint}"
        )
    smoothing = settings.label_smoothing
    ranges = {"exo_pair": 0 < smoothing < 1, "robust": 0 <= smoothing < 0.5}
    if not ranges.get(loss_type, smoothing == 0):
        expected = {"exo_pair": "in (0, 1)", "robust": "in [0, 0.5)"}.get(loss_type, "0")
        raise ValueError(
            f"label_smoothing must be {expected} with loss_type {loss_type!r}, got {smoothing}"
        )


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean log-probability of a token), as ORPO has it."""
    return mean_logps - torch.log1p(-mean_logps.exp())
