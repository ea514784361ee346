"""Losses of single completions and of groups against their own mean.

Legend: B completions. Inputs are (B,) and detached: sums of log-probabilities under the policy,
the reference and the policy at the start of the update (`old`), rewards, prompt numbers, lengths.
Every loss is a mean over the completions that are not empty, unless it says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.preferences.lists import make_lists
from fastrl.preferences.terms import SequenceTerms, bell
from fastrl.ragged import means, number_of


def kto(
    sequence_logps: Tensor, sequence_ref_logps: Tensor, rewards: Tensor, lengths: Tensor,
    *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
    reward_threshold: float = 0.0, mismatched_log_ratio: float = 0.0,
) -> SequenceTerms:  # fmt: skip
    """weight (1 - sigmoid(+-(beta delta - z))) (KTO, arXiv:2402.01306).

    A completion is desirable above the reward threshold. z = max(0, beta * mismatched_log_ratio),
    the mean log-ratio of completions under prompts that are not theirs, a constant of the step.
    """
    z = max(0.0, beta * mismatched_log_ratio)
    scores = beta * (sequence_logps - sequence_ref_logps) - z
    desirable, ones = rewards > reward_threshold, torch.ones_like(scores)
    signs = torch.where(desirable, ones, -ones)
    weights = torch.where(desirable, desirable_weight * ones, undesirable_weight)
    losses = weights * torch.sigmoid(-signs * scores)
    return _mean(lengths, losses, -signs * weights * beta * bell(scores))


def optimal_advantage_regression(
    sequence_logps: Tensor, sequence_ref_logps: Tensor, sequence_advantages: Tensor,
    lengths: Tensor, *, beta: float = 1e-3,
) -> SequenceTerms:  # fmt: skip
    """(beta delta - A)^2 with A = r - V*, V* the optimal value (A*-PO, arXiv:2505.20686)."""
    errors = beta * (sequence_logps - sequence_ref_logps) - sequence_advantages
    return _mean(lengths, errors.square(), 2 * beta * errors)


def group_variance(
    sequence_logps: Tensor, sequence_old_logps: Tensor, rewards: Tensor, groups: Tensor,
    lengths: Tensor, *, beta: float = 1.0,
) -> SequenceTerms:  # fmt: skip
    """-sg[(r - mean r) - beta (D - mean D)] L, D = L - L_old (GVPO, arXiv:2504.19599).

    Means are over the group. Its slopes sum to zero in every group: it is the gradient of half the
    variance of beta D - r, over beta.
    """
    errors = beta * (sequence_logps - sequence_old_logps) - rewards
    slopes = _centred(errors, groups, lengths)
    return _mean(lengths, slopes * sequence_logps, slopes)


def mirror_descent(
    sequence_logps: Tensor, sequence_old_logps: Tensor, rewards: Tensor, groups: Tensor,
    lengths: Tensor, *, tau: float = 0.1,
) -> SequenceTerms:  # fmt: skip
    """-(r - group mean) L + tau / 2 (L - L_old)^2 (Kimi k1.5, arXiv:2501.12599; OPMD)."""
    advantages = _centred(rewards, groups, lengths)
    log_ratios = sequence_logps - sequence_old_logps
    losses = 0.5 * tau * log_ratios.square() - advantages * sequence_logps
    return _mean(lengths, losses, tau * log_ratios - advantages)


def level_preference(
    sequence_logps: Tensor, sequence_ref_logps: Tensor, rewards: Tensor, groups: Tensor,
    lengths: Tensor, *, beta: float = 0.1, top_reward: float = 1.0, top_weight: float = 2.5,
) -> SequenceTerms:  # fmt: skip
    """Mean of DPO on mean log-ratios over all pairs of different level (TRPA, arXiv:2504.04524).

    Levels are rewards, the top level those of at least `top_reward`; a winner of the top level
    multiplies the margin by `top_weight`. In a group of one level each completion has the loss
    -log sigmoid(+-mean log-ratio), + for the top level. A mean over each group, then over groups.
    The method also penalises the k3 estimate against the old policy, token by token.
    """
    lists = make_lists(groups, lengths > 0)
    spans = lengths.clamp(min=1)
    ratios = lists.gather((sequence_logps - sequence_ref_logps) / spans)
    levels = lists.gather(rewards)
    both = lists.present[:, :, None] & lists.present[:, None, :]
    wins = both & (levels[:, :, None] > levels[:, None, :])
    top, ones = levels >= top_reward, torch.ones_like(ratios)
    scales = beta * torch.where(top, top_weight * ones, 1.0)[:, :, None]
    gaps = scales * (ratios[:, :, None] - ratios[:, None, :])
    pulls = torch.where(wins, scales * torch.sigmoid(-gaps), 0)
    num_pairs = wins.sum(dim=(1, 2))[:, None]
    losses = torch.where(wins, -logsigmoid(gaps), 0).sum(dim=2) / num_pairs.clamp(min=1)
    slopes = (pulls.sum(dim=1) - pulls.sum(dim=2)) / num_pairs.clamp(min=1)

    signs = torch.where(top, ones, -ones)
    sizes = lists.present.sum(dim=1, keepdim=True).clamp(min=1)
    alone = lists.present & (num_pairs == 0)
    losses = torch.where(alone, -logsigmoid(signs * ratios) / sizes, losses)
    slopes = torch.where(alone, -signs * torch.sigmoid(-signs * ratios) / sizes, slopes)
    num_groups = lists.present.any(dim=1).sum().clamp(min=1)
    return SequenceTerms(
        lists.scatter(losses / num_groups), lists.scatter(slopes / num_groups) / spans
    )


def _centred(values: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """Values minus the mean over the counted completions of the group; 0 for the others."""
    counted = (lengths > 0).nonzero()[:, 0]
    centre = means(values[counted], groups[counted], number_of(groups))
    return torch.where(lengths > 0, values - centre[groups], 0)


def _mean(lengths: Tensor, losses: Tensor, slopes: Tensor) -> SequenceTerms:
    counted = lengths > 0
    num = counted.sum().clamp(min=1)
    return SequenceTerms(
        torch.where(counted, losses, 0) / num, torch.where(counted, slopes, 0) / num
    )
