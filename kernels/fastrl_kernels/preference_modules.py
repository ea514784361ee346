"""Losses of preferences with the signatures of Liger's `LigerFusedLinear...Loss` modules.

B rows of T places, D hidden, n pairs: the first half of the rows is chosen, the second rejected.
Log-probabilities first, the formula on one number for each row, the logits again in backward: no
tensor of (B, T, V). `compiled` and `chunk_size`, which say how Liger cuts its work, have no effect;
`workspace_mb` bounds it. Sums of logits, which are returned to be logged, are taken without logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastrl_kernels.batches import (
    Settings,
    check_batch,
    head_with_bias,
    sums_of_logits,
    sums_over_places,
    table_logps,
)
from fastrl_kernels.head import LMHead
from fastrl_kernels.pair_losses import PAIR_LOSSES, PairSettings, check_pair_loss, log_odds

Head = nn.Module | LMHead | Tensor
Returned = tuple[Tensor, tuple[Tensor, ...]]


class _Pairs(NamedTuple):
    """What a loss of pairs is made of."""

    chosen_logps: Tensor  # (n,)
    rejected_logps: Tensor  # (n,)
    nll: Tensor  # 0-dim: of the chosen completions, a mean over their tokens
    logged: tuple[Tensor, ...]  # first things that every loss of pairs returns


class _PreferenceLoss(nn.Module):
    """What all of them have: which ids are ignored, and how rows become numbers."""

    def __init__(
        self, ignore_index: int, beta: float, average_log_prob: bool, settings: Settings
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta = ignore_index, beta
        self.average_log_prob, self.settings = average_log_prob, settings

    def token_logps(self, _input: Tensor, head: LMHead, target: Tensor) -> Tensor:
        """(B, T), 0 where the id is ignored."""
        check_batch(_input, target, "target")
        ids = target.masked_fill(target == self.ignore_index, -1)
        return table_logps(_input, head, ids, self.settings)

    def row_logps(self, logps: Tensor, target: Tensor) -> Tensor:
        """(B,) sums over the tokens of a row, or means."""
        totals = logps.sum(1)
        if not self.average_log_prob:
            return totals
        return totals / (target != self.ignore_index).sum(1).clamp(min=1)

    def reference_logps(
        self, ref_input: Tensor | None, ref_weight: Head | None, ref_bias: Tensor | None,
        target: Tensor,
    ) -> Tensor:  # fmt: skip
        """(B,) of the reference model, without gradient."""
        if ref_input is None or ref_weight is None:
            raise ValueError(
                "use_ref_model=True needs ref_input and ref_weight, got None; give the reference "
                "model's hidden states and head, or set use_ref_model=False"
            )
        with torch.no_grad():
            logps = self.token_logps(ref_input, head_with_bias(ref_weight, ref_bias), target)
            return self.row_logps(logps, target)

    def pairs(
        self, lin_weight: Head, _input: Tensor, target: Tensor, bias: Tensor | None, *,
        compute_nll_loss: bool, nll_target: Tensor | None = None,
    ) -> _Pairs:  # fmt: skip
        """Numbers of both halves of the batch."""
        if target.shape[0] % 2 or not target.shape[0]:
            raise ValueError(
                f"target must hold as many rejected rows as chosen ones, got {target.shape[0]} "
                "rows; stack the chosen half before the rejected one"
            )
        head, num = head_with_bias(lin_weight, bias), target.shape[0] // 2
        logps = self.token_logps(_input, head, target)
        nll = logps.new_zeros(())
        if compute_nll_loss:
            others = target[:num] if nll_target is None else nll_target[:num]
            known = nll_target is None
            chosen = logps[:num] if known else self.token_logps(_input[:num], head, others)
            nll = -chosen.sum() / (others != self.ignore_index).sum()
        chosen_logps, rejected_logps = self.row_logps(logps, target).chunk(2)
        sums = sums_over_places(_input).view(2, num, -1).sum(1)
        num_places = num * target.shape[1]
        totals = sums_of_logits(sums, sums.new_full((2,), num_places), head)
        means = totals / (num_places * head.num_columns)
        return _Pairs(
            chosen_logps, rejected_logps, nll,
            (chosen_logps.detach(), rejected_logps.detach(), *means, nll.detach()),
        )  # fmt: skip


def _check_reference(is_used: bool, ref_input: Tensor | None) -> None:
    if ref_input is not None and not is_used:
        raise ValueError(
            "use_ref_model=False takes no reference, got ref_input; leave it out, or set "
            "use_ref_model=True"
        )


class FusedLinearDPOLoss(_PreferenceLoss):
    """DPO and nine relatives: arguments, order and returns of `LigerFusedLinearDPOLoss`."""

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0,
        compute_nll_loss: bool = False, compiled: bool = True, use_ref_model: bool = True,
        average_log_prob: bool = False, chunk_size: int = 1, loss_type: str = "sigmoid",
        label_smoothing: float = 0.0, discopop_tau: float = 0.05, *,
        workspace_mb: float = 256, implementation: str = "auto",
    ) -> None:  # fmt: skip
        settings = Settings(workspace_mb, implementation)
        super().__init__(ignore_index, beta, average_log_prob, settings)
        self.alpha, self.compute_nll_loss, self.use_ref_model = (
            alpha, compute_nll_loss, use_ref_model,
        )  # fmt: skip
        self.loss_type = loss_type
        self.pair_settings = PairSettings(beta, label_smoothing, discopop_tau)
        check_pair_loss(loss_type, self.pair_settings)

    def forward(
        self, lin_weight: Head, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Head | None = None,
        ref_bias: Tensor | None = None,
    ) -> Returned:  # fmt: skip
        """The loss, then chosen and rejected logps (n,), mean logits, NLL and rewards (n,).

        _input: (B, T, D) hidden states that predict target (B, T), chosen rows first.
        """
        pairs = self.pairs(lin_weight, _input, target, bias, compute_nll_loss=self.compute_nll_loss)
        chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
        _check_reference(self.use_ref_model, ref_input)
        if self.use_ref_model:
            reference = self.reference_logps(ref_input, ref_weight, ref_bias, target).chunk(2)
            chosen, rejected = chosen - reference[0], rejected - reference[1]
        losses = PAIR_LOSSES[self.loss_type](chosen, rejected, self.pair_settings)
        rewards = (self.beta * chosen.detach(), self.beta * rejected.detach())
        return self.alpha * pairs.nll + losses.mean(), (*pairs.logged, *rewards)


class FusedLinearCPOLoss(_PreferenceLoss):
    """CPO (arXiv:2401.08417): arguments, order and returns of `LigerFusedLinearCPOLoss`."""

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0,
        label_smoothing: float = 0.0, compute_nll_loss: bool = True, compiled: bool = True,
        average_log_prob: bool = False, chunk_size: int = 1, *,
        workspace_mb: float = 256, implementation: str = "auto",
    ) -> None:  # fmt: skip
        settings = Settings(workspace_mb, implementation)
        super().__init__(ignore_index, beta, average_log_prob, settings)
        self.alpha, self.label_smoothing = alpha, label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.margin = 0.0

    def forward(
        self, lin_weight: Head, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Returned:
        """The loss, then chosen and rejected logps (n,), mean logits, NLL and rewards (n,)."""
        pairs = self.pairs(lin_weight, _input, target, bias, compute_nll_loss=self.compute_nll_loss)
        margins = self.beta * (pairs.chosen_logps - pairs.rejected_logps) - self.margin
        flipped = self.label_smoothing
        losses = -(1 - flipped) * logsigmoid(margins) - flipped * logsigmoid(-margins)
        rewards = (self.beta * pairs.logged[0], self.beta * pairs.logged[1])
        return self.alpha * pairs.nll + losses.mean(), (*pairs.logged, *rewards)


class FusedLinearSimPOLoss(FusedLinearCPOLoss):
    """SimPO (arXiv:2405.14734): arguments, order and returns of `LigerFusedLinearSimPOLoss`.

    CPO on means over tokens with a margin `gamma`, which is the paper's, not gamma / beta.
    """

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0,
        label_smoothing: float = 0.0, compute_nll_loss: bool = True, compiled: bool = True,
        gamma: float = 0.5, chunk_size: int = 1, *,
        workspace_mb: float = 256, implementation: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(
            ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, True,
            chunk_size, workspace_mb=workspace_mb, implementation=implementation,
        )  # fmt: skip
        self.margin = gamma


class FusedLinearORPOLoss(_PreferenceLoss):
    """ORPO (arXiv:2403.07691): arguments, order and returns of `LigerFusedLinearORPOLoss`."""

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, compute_nll_loss: bool = True,
        compiled: bool = True, chunk_size: int = 1, *,
        workspace_mb: float = 256, implementation: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(ignore_index, beta, True, Settings(workspace_mb, implementation))
        self.compute_nll_loss = compute_nll_loss

    def forward(
        self, lin_weight: Head, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Returned:  # fmt: skip
        """The loss, then what DPO returns, and the mean log odds ratio before and after sigmoid.

        nll_target: (B, T) ids of the likelihood term, where they are not those of the pairs.
        """
        pairs = self.pairs(
            lin_weight, _input, target, bias, compute_nll_loss=self.compute_nll_loss,
            nll_target=nll_target,
        )  # fmt: skip
        odds = log_odds(pairs.chosen_logps) - log_odds(pairs.rejected_logps)
        gains = logsigmoid(odds)
        rewards = (self.beta * pairs.logged[0], self.beta * pairs.logged[1])
        logged = (*pairs.logged, *rewards, gains.mean().detach(), odds.mean().detach())
        return pairs.nll - self.beta * gains.mean(), logged


class FusedLinearKTOLoss(_PreferenceLoss):
    """KTO (arXiv:2402.01306): arguments, order and returns of `LigerFusedLinearKTOLoss`."""

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, compiled: bool = True,
        use_ref_model: bool = False, average_log_prob: bool = False, chunk_size: int = 1, *,
        workspace_mb: float = 256, implementation: str = "auto",
    ) -> None:  # fmt: skip
        settings = Settings(workspace_mb, implementation)
        super().__init__(ignore_index, beta, average_log_prob, settings)
        self.use_ref_model = use_ref_model

    def forward(
        self, _input: Tensor, lin_weight: Head, target: Tensor, bias: Tensor | None = None,
        preference_labels: Tensor | None = None, ref_input: Tensor | None = None,
        ref_weight: Head | None = None, ref_bias: Tensor | None = None, kl: Tensor | None = None,
    ) -> Returned:  # fmt: skip
        """The loss, then sums over chosen and over rejected rows of logps, logits and rewards.

        preference_labels: (B,) bool, True for chosen rows. kl: the zero of rewards over beta.
        """
        if preference_labels is None or preference_labels.shape != target.shape[:1]:
            shape = None if preference_labels is None else tuple(preference_labels.shape)
            raise ValueError(
                f"preference_labels must be bool of shape ({target.shape[0]},), got {shape}; say "
                "which rows are chosen"
            )
        labels, head = preference_labels.bool(), head_with_bias(lin_weight, bias)
        logps = self.row_logps(self.token_logps(_input, head, target), target)
        ratios = logps
        _check_reference(self.use_ref_model, ref_input)
        if self.use_ref_model:
            ratios = logps - self.reference_logps(ref_input, ref_weight, ref_bias, target)
        signs = torch.where(labels, 1, -1)
        losses = 1 - (self.beta * (ratios if kl is None else ratios - kl) * signs).sigmoid()
        of_label = torch.stack([labels, ~labels]).to(logps.dtype)  # (2, B)
        num_places = of_label.sum(1) * target.shape[1]
        hidden_sums = (of_label[:, :, None] * sums_over_places(_input)).sum(1)  # (2, D)
        logits = sums_of_logits(hidden_sums, num_places, head)
        totals = [(of_label * x.detach()).sum(1) for x in (logps, self.beta * ratios)]
        logged = (*totals[0], *logits, *totals[1])
        return losses.mean(), logged
