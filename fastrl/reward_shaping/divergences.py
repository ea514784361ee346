"""Rewards that pay for leaving another model: the reference, a teacher.

Legend: B completions, S trained tokens. Log-probabilities are constants here, in nats, so what is
subtracted is an ordinary reward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.statistics import whiten
from fastrl.ragged import sums


def kl_penalised(
    rewards: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    completion_index: Tensor,
    *,
    beta: float = 0.03,
) -> Tensor:
    """r - beta * sum over the completion of old_logp - ref_logp (RLOO, arXiv:2402.14740)."""
    return rewards - beta * _log_ratios(rewards, old_logps, ref_logps, completion_index)


def kl_penalised_tokens(
    token_rewards: Tensor, old_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.05
) -> Tensor:
    """Token reward - beta * (old_logp - ref_logp) (InstructGPT, arXiv:2203.02155)."""
    return token_rewards - beta * (old_logps - ref_logps)


def whitened_kl_penalised_tokens(
    token_rewards: Tensor, old_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.05,
    std_epsilon: float = 1e-8,
) -> Tensor:  # fmt: skip
    """kl_penalised_tokens over their standard deviation over all tokens of the step; their mean
    stays (whiten_rewards of PPO trainers).
    """
    rewards = kl_penalised_tokens(token_rewards, old_logps, ref_logps, beta=beta)
    mean = rewards.mean()
    return whiten(rewards, std_epsilon=std_epsilon) + mean


def teacher_penalised_tokens(
    token_rewards: Tensor,
    rewards: Tensor,
    old_logps: Tensor,
    teacher_logps: Tensor,
    completion_index: Tensor,
    *,
    beta: float = 0.001,
    wrong_below: float = 0.1,
) -> Tensor:
    """Token reward - beta * (old_logp - teacher_logp) where the completion is wrong (DGPO,
    arXiv:2508.20324). teacher_logps: (S,). Correct completions explore freely.
    """
    is_wrong = (rewards < wrong_below)[completion_index]
    return token_rewards - torch.where(is_wrong, beta * (old_logps - teacher_logps), 0)


def preference_tokens(
    token_rewards: Tensor,
    dpo_logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float = 0.05,
    bound: float = 0.05,
) -> Tensor:
    """Token reward + clip(beta * (dpo_logp - ref_logp), +-bound) (RTO, arXiv:2404.18922).

    dpo_logps: (S,) of a model trained with DPO. The published recipe also clips the rewards to
    +-10 beforehand and subtracts the KL penalty of kl_penalised_tokens with beta 0.01.
    """
    return token_rewards + (beta * (dpo_logps - ref_logps)).clamp(-bound, bound)


def chi_squared_penalised(
    rewards: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    completion_index: Tensor,
    *,
    coefficient: float,
) -> Tensor:
    """r - coefficient * (ratio - 1), ratio to the reference of the whole completion
    (arXiv:2403.03185). The log ratio is at most 5. Published coefficients are 0.01 to 1 times the
    standard deviation of the reward under the reference.
    """
    log_ratios = _log_ratios(rewards, old_logps, ref_logps, completion_index)
    return rewards - coefficient * log_ratios.clamp(-20, 5).expm1()


def root_chi_squared_penalised(
    rewards: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    completion_index: Tensor,
    *,
    coefficient: float,
    trimmed: float = 0.01,
) -> Tensor:
    """chi_squared_penalised with the penalty divided by the root of its mean over the batch.

    The mean leaves out a share `trimmed` of the completions on either side; where it is not
    positive the batch shows no divergence and nothing is subtracted (arXiv:2403.03185).
    """
    log_ratios = _log_ratios(rewards, old_logps, ref_logps, completion_index)
    excess = log_ratios.clamp(-20, 5).expm1()
    num_trimmed = int(trimmed * len(excess))
    middle = excess.sort().values[num_trimmed : len(excess) - num_trimmed]
    root = middle.mean().clamp(min=0).sqrt()
    return rewards - coefficient * torch.where(root > 0, excess / root, 0)


def constrained(
    rewards: Tensor,
    baseline_rewards: Tensor,
    constraints_met: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    completion_index: Tensor,
    *,
    max_kl: float = 5.0,
) -> Tensor:
    """sigmoid(r - baseline) * max(0, 1 - log ratio / max_kl), 0 where a constraint is broken
    (CGPO, arXiv:2409.20370). baseline_rewards: (B,) of the data set's own answers;
    constraints_met: (B,) bool; the log ratio to the reference is that of the whole completion.
    """
    log_ratios = _log_ratios(rewards, old_logps, ref_logps, completion_index)
    nearness = (1 - log_ratios / max_kl).clamp(min=0)
    return torch.where(constraints_met, torch.sigmoid(rewards - baseline_rewards) * nearness, 0)


def _log_ratios(
    rewards: Tensor, old_logps: Tensor, ref_logps: Tensor, completion_index: Tensor
) -> Tensor:
    """(B,) log ratio of each completion to the reference, in nats and in the rewards' dtype."""
    return sums((old_logps - ref_logps).to(rewards.dtype), completion_index, rewards.numel())
