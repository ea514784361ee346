"""Losses of whole groups of completions: rankings and distributions over a list.

Legend: B completions, P prompts, K completions of the largest group. Inputs are (B,) and detached:
sums of log-probabilities under the policy and the reference, rewards, prompt numbers and lengths.
Every loss is a sum over a list and a mean over the lists of at least two completions that are not
empty; others have no part in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.preferences.terms import SequenceTerms
from fastrl.ragged import counts, number_of


class Lists(NamedTuple):
    """The completions of each prompt as a row of a matrix."""

    rows: Tensor  # (P, K) int64 number of the completion; 0 where there is none
    present: Tensor  # (P, K) bool
    columns: Tensor  # (B,) int64 place in its row; K for a completion that is left out
    groups: Tensor  # (B,) int64

    def gather(self, values: Tensor, *, absent: float = 0.0) -> Tensor:
        """(B,) as (P, K)."""
        return torch.where(self.present, values[self.rows], absent)

    def scatter(self, matrix: Tensor) -> Tensor:
        """(P, K) as (B,), 0 for a completion that is left out."""
        return torch.nn.functional.pad(matrix, (0, 1))[self.groups, self.columns]


def make_lists(groups: Tensor, counted: Tensor) -> Lists:
    """Lists of the counted completions, in the order of their numbers."""
    num_groups = number_of(groups)
    taken = counted.nonzero()[:, 0]
    order = taken[torch.argsort(groups[taken], stable=True)]
    sizes = counts(groups[order], num_groups)
    width = int(sizes.max()) if num_groups else 0
    starts = sizes.cumsum(0) - sizes
    places = torch.arange(order.shape[0], device=groups.device) - starts[groups[order]]
    columns = torch.full_like(groups, width)
    columns[order] = places
    rows = groups.new_zeros((num_groups, width))
    rows[groups[order], places] = order
    present = torch.arange(width, device=groups.device) < sizes[:, None]
    return Lists(rows, present, columns, groups)


def list_wise_exo(
    sequence_logps: Tensor, sequence_ref_logps: Tensor, rewards: Tensor, groups: Tensor,
    lengths: Tensor, *, beta: float = 0.5, reward_temperature: float = 0.5,
) -> SequenceTerms:  # fmt: skip
    """KL(softmax(beta delta) || softmax(r / temperature)) over a list (EXO, arXiv:2402.00856)."""
    lists, scores = _scores(sequence_logps, sequence_ref_logps, groups, lengths, beta)
    log_q = _log_softmax(lists, scores)
    log_p = _log_softmax(lists, lists.gather(rewards) / reward_temperature)
    q = torch.where(lists.present, log_q.exp(), 0)
    losses = q * (log_q - log_p)
    return _mean(lists, losses, beta * (losses - q * losses.sum(dim=1, keepdim=True)))


def info_nca(
    sequence_logps: Tensor, sequence_ref_logps: Tensor, rewards: Tensor, groups: Tensor,
    lengths: Tensor, *, beta: float = 0.01, reward_temperature: float = 0.01,
) -> SequenceTerms:  # fmt: skip
    """Cross-entropy of softmax(r / temperature) and softmax(beta delta) (arXiv:2402.05369)."""
    lists, scores = _scores(sequence_logps, sequence_ref_logps, groups, lengths, beta)
    targets = _log_softmax(lists, lists.gather(rewards) / reward_temperature).exp()
    return _cross_entropy(lists, torch.where(lists.present, targets, 0), scores, beta)


def list_softmax(
    sequence_logps: Tensor, sequence_ref_logps: Tensor, rewards: Tensor, groups: Tensor,
    lengths: Tensor, *, beta: float = 0.05,
) -> SequenceTerms:  # fmt: skip
    """-sum of reward * log softmax(beta delta) over a list (LiPO, arXiv:2402.01878).

    Rewards are labels in [0, 1] and are not normalised.
    """
    lists, scores = _scores(sequence_logps, sequence_ref_logps, groups, lengths, beta)
    return _cross_entropy(lists, lists.gather(rewards), scores, beta)


def plackett_luce(
    sequence_logps: Tensor, sequence_ref_logps: Tensor, rewards: Tensor, groups: Tensor,
    lengths: Tensor, *, beta: float = 0.1,
) -> SequenceTerms:  # fmt: skip
    """-log probability of the ranking by reward (DPO for lists, arXiv:2305.18290 appendix A.3).

    Completions of equal reward count as ranked by their order.
    """
    lists, scores = _scores(sequence_logps, sequence_ref_logps, groups, lengths, beta)
    ranking = torch.argsort(
        lists.gather(rewards, absent=-torch.inf), dim=1, descending=True, stable=True
    )
    ranked = torch.where(lists.present, scores, -torch.inf).gather(1, ranking)
    # [p, k, j]: probability that j is drawn in round k, in which the first k are gone.
    num = ranked.shape[1]
    left = torch.ones(num, num, dtype=torch.bool, device=ranked.device).triu()
    rounds = torch.where(left, ranked[:, None, :], -torch.inf).log_softmax(dim=2)
    played = lists.present.gather(1, ranking)
    losses = torch.where(played, -rounds.diagonal(dim1=1, dim2=2), 0)
    drawn = torch.where(played[:, :, None] & played[:, None, :], rounds.exp(), 0).sum(dim=1)
    slopes = torch.where(played, beta * (drawn - 1), 0)
    rank = torch.argsort(ranking, dim=1)
    return _mean(lists, losses.gather(1, rank), slopes.gather(1, rank))


def lambda_rank(
    sequence_logps: Tensor, sequence_ref_logps: Tensor, rewards: Tensor, groups: Tensor,
    lengths: Tensor, *, beta: float = 0.05,
) -> SequenceTerms:  # fmt: skip
    """-w log sigmoid(s_i - s_j) over all pairs with r_i > r_j (LiPO-lambda, arXiv:2402.01878).

    w = |2^r_i - 2^r_j| |1 / D_i - 1 / D_j|, D = log(1 + rank by the current score), a constant of
    the step. Rewards are labels in [0, 1]; equal scores rank by their order.
    """
    lists, scores = _scores(sequence_logps, sequence_ref_logps, groups, lengths, beta)
    labels = lists.gather(rewards)
    ranking = torch.argsort(
        torch.where(lists.present, scores, -torch.inf), dim=1, descending=True, stable=True
    )
    discounts = 1.0 / (2.0 + torch.argsort(ranking, dim=1)).to(scores.dtype).log()
    weights = (_gaps(torch.exp2(labels)) * _gaps(discounts)).abs()
    weights = torch.where(_better(lists, labels), weights, 0)
    gaps = _gaps(scores)
    pulls = beta * weights * torch.sigmoid(-gaps)
    losses = torch.where(weights > 0, -weights * logsigmoid(gaps), 0)
    return _mean(lists, losses.sum(dim=2), pulls.sum(dim=1) - pulls.sum(dim=2))


def rank_hinge(
    sequence_logps: Tensor, rewards: Tensor, groups: Tensor, lengths: Tensor
) -> SequenceTerms:
    """max(0, mean_j - mean_i) over all pairs with r_i > r_j (RRHF, arXiv:2304.05302).

    Of mean log-probabilities per token, without a reference.
    """
    lists = make_lists(groups, lengths > 0)
    spans = lengths.clamp(min=1)
    gaps = _gaps(lists.gather(sequence_logps / spans))
    violated = (_better(lists, lists.gather(rewards)) & (gaps < 0)).to(gaps.dtype)
    slopes = violated.sum(dim=1) - violated.sum(dim=2)
    terms = _mean(lists, (-gaps).clamp(min=0).mul(violated).sum(dim=2), slopes)
    return terms._replace(slopes=terms.slopes / spans)


def _scores(
    sequence_logps: Tensor, sequence_ref_logps: Tensor, groups: Tensor, lengths: Tensor, beta: float
) -> tuple[Lists, Tensor]:
    lists = make_lists(groups, lengths > 0)
    return lists, lists.gather(beta * (sequence_logps - sequence_ref_logps))


def _log_softmax(lists: Lists, scores: Tensor) -> Tensor:
    """(P, K) over the present completions; 0 elsewhere, so that nothing infinite gets on."""
    masked = torch.where(lists.present, scores, -torch.inf).log_softmax(dim=1)
    return torch.where(lists.present, masked, 0)


def _cross_entropy(lists: Lists, targets: Tensor, scores: Tensor, beta: float) -> SequenceTerms:
    log_q = _log_softmax(lists, scores)
    q = torch.where(lists.present, log_q.exp(), 0)
    slopes = beta * (q * targets.sum(dim=1, keepdim=True) - targets)
    return _mean(lists, -targets * log_q, slopes)


def _gaps(values: Tensor) -> Tensor:
    """[p, i, j] = value i - value j."""
    return values[:, :, None] - values[:, None, :]


def _better(lists: Lists, rewards: Tensor) -> Tensor:
    """[p, i, j]: both are there and i has the higher reward."""
    both = lists.present[:, :, None] & lists.present[:, None, :]
    return both & (rewards[:, :, None] > rewards[:, None, :])


def _mean(lists: Lists, losses: Tensor, slopes: Tensor) -> SequenceTerms:
    """Of (P, K) terms over the lists of at least two."""
    longer = lists.present.sum(dim=1, keepdim=True) > 1
    num = longer.sum().clamp(min=1)
    return SequenceTerms(
        lists.scatter(torch.where(longer, losses, 0) / num),
        lists.scatter(torch.where(longer, slopes, 0) / num),
    )
