"""GRPO's losses of whole sequences from (B, T) log-probabilities, and what all of them log.

B completions of T places. Plain PyTorch with autograd: nothing here is larger than (B, T).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastrl_kernels.grpo_modules import FusedLinearGRPOLoss

LOWEST_RATIO, HIGHEST_LOG_RATIO = 1e-8, 20.0
"""Bounds of a sequence's ratio and of log-ratios within VESPO's weight."""


class GRPOBatch(NamedTuple):
    """(B, T) each unless said otherwise, constants in the dtype of sums."""

    target_ids: Tensor  # below 0 where nothing is trained
    mask: Tensor
    weights: Tensor  # of the loss of each token: mask and averaging
    advantages: Tensor  # (B, 1)
    old_logps: Tensor | None
    ref_logps: Tensor | None  # None where the loss has no use for them
    rollout_weights: Tensor | None  # (B, T) or (B, 1)


def sequence_loss(loss: FusedLinearGRPOLoss, logps: Tensor, batch: GRPOBatch) -> Tensor:
    """Weighted sum of the loss of every token, the ratio being a sequence's where it is asked."""
    log_ratios = _log_ratios(logps, batch)
    shares = _of_level(loss, log_ratios, batch)
    if loss.loss_type == "vespo":
        weights = vespo_weights(loss, log_ratios.detach(), batch)
        losses = -weights * batch.advantages * logps
    else:
        ratios = shares.exp()
        clipped = ratios.clamp(1 - loss.epsilon_low, 1 + loss.epsilon_high)
        capped = ratios if loss.delta is None else ratios.clamp(max=loss.delta)
        losses = -torch.minimum(capped * batch.advantages, clipped * batch.advantages)
        if batch.rollout_weights is not None:
            losses = losses * batch.rollout_weights
    if batch.ref_logps is not None:
        losses = losses + loss.beta * _penalties(loss, logps, batch, shares)
    return (losses * batch.weights).sum()


@torch.no_grad()
def metrics(loss: FusedLinearGRPOLoss, logps: Tensor, batch: GRPOBatch) -> tuple[Tensor, ...]:
    """Means over trained tokens: of the KL penalty where there is one, of what was clipped."""
    shares = _of_level(loss, _log_ratios(logps, batch), batch)
    ratios, advantages = shares.exp(), batch.advantages
    if loss.loss_type in ("sapo", "vespo"):
        clipped = torch.zeros_like(ratios, dtype=torch.bool)
    elif loss.loss_type == "cispo":
        clipped = (ratios > loss.epsilon_high) & (advantages > 0)
    else:
        clipped = (ratios < 1 - loss.epsilon_low) & (advantages < 0)
        clipped = clipped | ((ratios > 1 + loss.epsilon_high) & (advantages > 0))
    found = [clipped.to(batch.mask.dtype)]
    if batch.ref_logps is not None:
        found.insert(0, _penalties(loss, logps, batch, shares))
    num_tokens = batch.mask.sum().clamp(min=1)
    return tuple((values * batch.mask).sum() / num_tokens for values in found)


def vespo_weights(loss: FusedLinearGRPOLoss, log_ratios: Tensor, batch: GRPOBatch) -> Tensor:
    """(B, 1) e^c w^k e^(-c w), 1 for w = 1, of a sequence's ratio w (VESPO, arXiv:2602.10693).

    k and c by the sign of the advantage. The correction for the sampler is a part of w.
    """
    lowest = math.log(LOWEST_RATIO)
    bounded = log_ratios.clamp(-HIGHEST_LOG_RATIO, HIGHEST_LOG_RATIO)
    totals = (bounded * batch.mask).sum(1, keepdim=True)
    if batch.rollout_weights is not None:
        corrections = batch.rollout_weights.log().clamp(lowest, HIGHEST_LOG_RATIO)
        totals = totals + corrections.sum(1, keepdim=True)
    totals = totals.clamp(lowest, HIGHEST_LOG_RATIO)
    is_good = batch.advantages >= 0
    powers = torch.where(is_good, loss.vespo_k_pos, loss.vespo_k_neg)
    decays = torch.where(is_good, loss.vespo_lambda_pos, loss.vespo_lambda_neg).clamp(min=1e-4)
    weights = (decays + powers * totals - decays * totals.exp()).exp()
    return weights.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def tokens_of_a_process(mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
    """Trained tokens a process: of the step where their number is given, else of this batch."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    num_processes = torch.distributed.get_world_size() if distributed else 1
    if num_items_in_batch is not None:
        total = torch.as_tensor(num_items_in_batch, dtype=mask.dtype, device=mask.device)
    else:
        total = mask.sum()
        if distributed:
            torch.distributed.all_reduce(total)
    return (total / num_processes).clamp(min=1)


def _log_ratios(logps: Tensor, batch: GRPOBatch) -> Tensor:
    """(B, T); without old log-probabilities the policy is its own old policy."""
    return logps - (logps.detach() if batch.old_logps is None else batch.old_logps)


def _of_level(loss: FusedLinearGRPOLoss, log_ratios: Tensor, batch: GRPOBatch) -> Tensor:
    """(B, T) of tokens, or (B, 1): the mean over the trained tokens of a sequence (GSPO)."""
    if loss.importance_sampling_level == "token":
        return log_ratios
    lengths = batch.mask.sum(1, keepdim=True).clamp(min=1)
    return (log_ratios * batch.mask).sum(1, keepdim=True) / lengths


def _penalties(
    loss: FusedLinearGRPOLoss, logps: Tensor, batch: GRPOBatch, shares: Tensor
) -> Tensor:
    """(B, T) k3 estimates of KL(policy || reference), times the ratio where that is asked."""
    assert batch.ref_logps is not None
    differences = batch.ref_logps - logps
    values = differences.exp() - differences - 1
    return values * shares.exp() if loss.use_bias_correction_kl else values
