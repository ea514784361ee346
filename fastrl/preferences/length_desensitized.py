"""DPO that counts what a completion has beyond the length of its partner less.

Legend: n pairs, S trained tokens. Which tokens count less depends on the pair, so that this loss
works on tokens where the others work on sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.preferences.terms import SequenceLoss
from fastrl.ragged import counts, sums


def length_desensitized_dpo(
    logps: Tensor, ref_logps: Tensor, completion_index: Tensor, lengths: Tensor, pairs: Tensor,
    *, beta: float = 0.1, alpha: float = 0.5,
) -> SequenceLoss:  # fmt: skip
    """DPO with log-ratios beyond the shorter of the two scaled by alpha (LD-DPO, arXiv:2409.06411).

    Tokens (S,), lengths (B,), pairs (n, 2) of (chosen, rejected). A mean over pairs.
    """
    num_pairs, num_tokens = pairs.shape[0], logps.shape[0]
    if num_pairs == 0:
        return SequenceLoss(logps.new_zeros(()), torch.zeros_like(logps))
    num_each = counts(completion_index, lengths.shape[0])
    starts = num_each.cumsum(0) - num_each
    members = pairs.flatten()  # chosen and rejected of a pair alternate
    sizes = lengths[members]
    owners = torch.repeat_interleave(torch.arange(2 * num_pairs, device=logps.device), sizes)
    positions = torch.arange(owners.shape[0], device=logps.device)
    positions = positions - (sizes.cumsum(0) - sizes)[owners]
    tokens = starts[members][owners] + positions
    shorter = sizes.view(-1, 2).amin(dim=1).repeat_interleave(2)
    weights = torch.where(positions < shorter[owners], torch.ones_like(logps[tokens]), alpha)

    scores = sums(weights * (logps - ref_logps)[tokens], owners, 2 * num_pairs).view(-1, 2)
    u = beta * (scores[:, 0] - scores[:, 1])
    slopes = -beta * torch.sigmoid(-u) / num_pairs
    slopes = torch.stack([slopes, -slopes], dim=1).flatten()
    return SequenceLoss(
        -logsigmoid(u).sum() / num_pairs,
        sums(slopes[owners] * weights, tokens, num_tokens),
    )
