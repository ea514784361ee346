"""Weights of tokens for the difference between the sampler and the trainer.

Legend: B completions, S trained tokens. The ratio of a token is
kappa = exp(old_logp - rollout_logp): trainer at the start of the update over sampler. Every rule
of CORRECTIONS returns (S,) constants that multiply the losses of the tokens, in the dtype of its
input; a token of weight 0 still counts in every average.

Log ratios are clamped to +-20 before exp, also as sums, so an infinite rollout_logp gives a finite
weight. NaN is not looked for, which would wait for the GPU, and comes out as NaN or, from rules
that compare, as 0. Where the rollout log-probabilities themselves serve as old_logps there is
nothing left to correct.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.ragged import counts, means, sums

MAX_LOG_RATIO = 20.0


def truncated_tokens(
    old_logps: Tensor, rollout_logps: Tensor, *, cap: float = 2.0, floor: float = 0.0
) -> Tensor:
    """min(kappa, cap), and at least `floor`: truncated importance sampling, token by token."""
    _check_bounds(floor, cap)
    return _log_ratios(old_logps, rollout_logps).exp().clamp(floor, cap)


def truncated_sequences(
    old_logps: Tensor, rollout_logps: Tensor, completion_index: Tensor, *, cap: float = 2.0
) -> Tensor:
    """min(product of kappa over the completion, cap) on each of its tokens."""
    _check_bounds(0.0, cap)
    log_ratios = _log_ratios(old_logps, rollout_logps)
    return _product(log_ratios, completion_index).clamp(max=cap)


def masked_tokens(
    old_logps: Tensor, rollout_logps: Tensor, *, lowest: float = 0.5, highest: float = 5.0
) -> Tensor:
    """kappa where it lies in [lowest, highest], else 0 (IcePop, arXiv:2510.18855)."""
    _check_bounds(lowest, highest)
    ratios = _log_ratios(old_logps, rollout_logps).exp()
    return torch.where(_inside(ratios, lowest, highest), ratios, 0)


def masked_sequences(
    old_logps: Tensor,
    rollout_logps: Tensor,
    completion_index: Tensor,
    *,
    lowest: float = 0.5,
    highest: float = 2.0,
) -> Tensor:
    """Product of kappa over the completion where it lies in [lowest, highest], else 0."""
    _check_bounds(lowest, highest)
    ratios = _product(_log_ratios(old_logps, rollout_logps), completion_index)
    return torch.where(_inside(ratios, lowest, highest), ratios, 0)


def sequence_masked_tokens(
    old_logps: Tensor,
    rollout_logps: Tensor,
    completion_index: Tensor,
    *,
    lowest: float = 0.5,
    highest: float = 2.0,
) -> Tensor:
    """kappa of the token where the completion's geometric mean lies in [lowest, highest], else 0.

    The ratio of a token has no bound of its own.
    """
    _check_bounds(lowest, highest)
    log_ratios = _log_ratios(old_logps, rollout_logps)
    kept = _inside(_mean(log_ratios, completion_index).exp(), lowest, highest)
    return torch.where(kept, log_ratios.exp(), 0)


def decoupled(old_logps: Tensor, rollout_logps: Tensor, *, cap: float = 5.0) -> Tensor:
    """min(kappa, cap) for rollouts of older weights (decoupled PPO, AReaL, arXiv:2505.24298).

    old_logps are those of the proximal policy, around which the surrogate clips its ratio.
    """
    return truncated_tokens(old_logps, rollout_logps, cap=cap)


def ratio_rejection(reduce: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Rule that gives 1 where the reduced log kappa lies between log bounds, else 0 (k1)."""

    def rule(
        old_logps: Tensor,
        rollout_logps: Tensor,
        completion_index: Tensor,
        *,
        lowest: float = 0.5,
        highest: float = 2.0,
    ) -> Tensor:
        """1 where kappa, reduced in log space, lies in [lowest, highest], else 0."""
        if not 0 < lowest <= highest:
            raise ValueError(
                f"expected 0 < lowest <= highest, got {lowest} and {highest}; both are ratios"
            )
        log_ratios = _log_ratios(old_logps, rollout_logps)
        reduced = reduce(log_ratios, completion_index)
        return _inside(reduced, math.log(lowest), math.log(highest)).to(log_ratios.dtype)

    return rule


def divergence_rejection(
    estimate: Callable[[Tensor], Tensor], reduce: Callable[[Tensor, Tensor], Tensor]
) -> Callable[..., Tensor]:
    """Rule that gives 1 where the reduced divergence estimate is at most a limit, else 0."""

    def rule(
        old_logps: Tensor, rollout_logps: Tensor, completion_index: Tensor, *, highest: float
    ) -> Tensor:
        """1 where the divergence, in nats, is at most `highest`, else 0."""
        if not highest > 0:
            raise ValueError(f"expected a divergence limit above 0 nats, got {highest}")
        log_ratios = _log_ratios(old_logps, rollout_logps)
        divergences = reduce(estimate(log_ratios), completion_index)
        return (divergences <= highest).to(log_ratios.dtype)

    return rule


def normalised_by_token(weights: Tensor) -> Tensor:
    """Weights divided by their mean over all tokens; unchanged where that is 0."""
    mean = weights.mean()
    return weights / torch.where(mean > 0, mean, 1)


def normalised_by_sequence(weights: Tensor, completion_index: Tensor, lengths: Tensor) -> Tensor:
    """Weights divided by the mean over completions of their mean weight; unchanged where it is 0.

    Completions without tokens do not count in the mean.
    """
    of_completion = means(weights, completion_index, lengths.numel())
    mean = of_completion.sum() / (lengths > 0).sum().clamp(min=1)
    return weights / torch.where(mean > 0, mean, 1)


def effective_sample_size(weights: Tensor) -> Tensor:
    """() number of equally weighted tokens worth as much: (sum w)^2 / sum w^2; 0 for none."""
    squares = weights.square().sum()
    return weights.sum().square() / torch.where(squares > 0, squares, 1)


def _log_ratios(old_logps: Tensor, rollout_logps: Tensor) -> Tensor:
    return (old_logps - rollout_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _k2(log_ratios: Tensor) -> Tensor:
    return log_ratios.square() / 2


def _k3(log_ratios: Tensor) -> Tensor:
    return log_ratios.expm1() - log_ratios


def _token(values: Tensor, completion_index: Tensor) -> Tensor:
    return values


def _sum(values: Tensor, completion_index: Tensor) -> Tensor:
    return sums(values, completion_index, _num_owners(completion_index))[completion_index]


def _mean(values: Tensor, completion_index: Tensor) -> Tensor:
    return means(values, completion_index, _num_owners(completion_index))[completion_index]


def _max(values: Tensor, completion_index: Tensor) -> Tensor:
    lengths = counts(completion_index, _num_owners(completion_index))
    order = torch.argsort(completion_index, stable=True)
    largest = torch.segment_reduce(values[order], "max", lengths=lengths)
    return largest[completion_index]


def _num_owners(completion_index: Tensor) -> int:
    """Completions up to the last with tokens; one, without tokens, where there are none."""
    return int(completion_index[-1]) + 1 if completion_index.numel() else 1


def _product(log_ratios: Tensor, completion_index: Tensor) -> Tensor:
    return _sum(log_ratios, completion_index).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _inside(values: Tensor, lowest: float, highest: float) -> Tensor:
    return (values >= lowest) & (values <= highest)


def _check_bounds(lowest: float, highest: float) -> None:
    if not 0 <= lowest < highest:
        raise ValueError(
            f"expected 0 <= {lowest} < {highest} for the bounds of a ratio; swap or correct them"
        )


CORRECTIONS: dict[str, Callable[..., Tensor]] = {
    "truncated_tokens": truncated_tokens,
    "truncated_sequences": truncated_sequences,
    "masked_tokens": masked_tokens,
    "masked_sequences": masked_sequences,
    "sequence_masked_tokens": sequence_masked_tokens,
    "decoupled": decoupled,
    "rejected_token_k1": ratio_rejection(_token),
    "rejected_sum_k1": ratio_rejection(_sum),
    "rejected_mean_k1": ratio_rejection(_mean),
    "rejected_token_k2": divergence_rejection(_k2, _token),
    "rejected_sum_k2": divergence_rejection(_k2, _sum),
    "rejected_mean_k2": divergence_rejection(_k2, _mean),
    "rejected_max_k2": divergence_rejection(_k2, _max),
    "rejected_token_k3": divergence_rejection(_k3, _token),
    "rejected_sum_k3": divergence_rejection(_k3, _sum),
    "rejected_mean_k3": divergence_rejection(_k3, _mean),
    "rejected_max_k3": divergence_rejection(_k3, _max),
}
"""The rejections by k1 bound a ratio; those by k2 = log^2 kappa / 2 and k3 = kappa - 1 - log kappa
bound a divergence, which has no published limit."""
