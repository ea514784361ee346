"""The objective of tokens whose log-probabilities are there already, by autograd.

S tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.objectives import Objective, Parameter, evaluate

LIMIT = 20.0  # of a log-ratio before exp


class TokenLoss(NamedTuple):
    """The loss of S tokens and what it was made of; tokens of weight 0 are 0 everywhere.

    Only the loss is differentiable, with respect to logps and entropies. Fractions and means are
    over the tokens with a weight, scalars all. With d = logp - old_logp (or - ref_logp, 0 without
    one) within +-20, the estimates of the divergence are k1 = d, k2 = d^2 / 2 and
    k3 = exp(-d) - 1 + d, nats.
    """

    loss: Tensor
    """Scalar: sum over tokens of token_weight * (objective - entropy_coef * entropy)."""
    slopes: Tensor
    """(S,) derivative of the loss with respect to each log-probability."""
    clipped: Tensor
    """(S,) bool: has an advantage, but the surrogate stopped it from learning."""
    clip_high: Tensor
    """Fraction that is clipped and has A > 0."""
    clip_low: Tensor
    """Fraction that is clipped and has A < 0 and a ratio of at most 1."""
    clip_dual: Tensor
    """Fraction that is clipped and has A < 0 and a ratio above 1."""
    entropy: Tensor
    """Mean, nats."""
    old_k1: Tensor
    old_k2: Tensor
    old_k3: Tensor
    ref_k1: Tensor
    ref_k2: Tensor
    ref_k3: Tensor
    max_ratio: Tensor
    """Largest exp(d) to the old policy; 0 without tokens."""
    effective_samples: Tensor
    """(sum k)^2 / (n sum k^2) of the n rollout weights k: 1 where all are alike."""


def token_loss_reference(
    logps: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    objective: Objective,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    entropy_coef: Parameter = 0.0,
) -> TokenLoss:
    """`token_loss` with the same arguments; autograd gives the gradients."""
    counted = token_weights != 0
    # What has no weight may hold anything; a GPU would have to be waited for to know of none.
    is_whole = not counted.is_cuda and bool(counted.all())

    def kept(values: Tensor) -> Tensor:
        return values if is_whole else torch.where(counted, values, 0)

    current = kept(logps).detach()
    old = current if old_logps is None else kept(old_logps)
    ref = current if ref_logps is None else kept(ref_logps)
    tokens = evaluate(objective, current, old, ref, advantages, rollout_weights)
    values, slopes, kept_entropies = kept(tokens.values), kept(tokens.slopes), kept(entropies)
    # The slope is the derivative of the value by construction, so a straight line through the value
    # carries both the exact loss and the exact gradient.
    losses = values + slopes * (kept(logps) - current)
    losses = losses - kept(entropy_coef * kept_entropies)
    clipped = tokens.clipped & counted
    weights = counted.to(logps.dtype) if rollout_weights is None else kept(rollout_weights)
    return TokenLoss(
        loss=(kept(token_weights) * losses).sum(),
        slopes=kept(token_weights) * slopes,
        clipped=clipped,
        **_metrics(clipped, advantages, kept_entropies.detach(), current, old, ref, counted),
        effective_samples=effective_samples(weights, counted),
    )


def _metrics(
    clipped: Tensor, advantages: Tensor, entropies: Tensor, logps: Tensor, old_logps: Tensor,
    ref_logps: Tensor, counted: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    num_tokens = counted.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return values.to(logps.dtype).sum() / num_tokens

    metrics = {
        "clip_high": mean(clipped & (advantages > 0)),
        "clip_low": mean(clipped & (advantages < 0) & (logps <= old_logps)),
        "clip_dual": mean(clipped & (advantages < 0) & (logps > old_logps)),
        "entropy": mean(entropies),
    }
    for name, other in (("old", old_logps), ("ref", ref_logps)):
        delta = (logps - other).clamp(-LIMIT, LIMIT)
        metrics[f"{name}_k1"] = mean(delta)
        metrics[f"{name}_k2"] = mean(delta.square() / 2)
        metrics[f"{name}_k3"] = mean(torch.exp(-delta) - 1 + delta)
    log_ratios = torch.where(counted, logps - old_logps, -torch.inf)
    padded = torch.cat([log_ratios, log_ratios.new_full((1,), -torch.inf)])
    metrics["max_ratio"] = padded.amax().clamp(max=LIMIT).exp()
    return metrics


def effective_samples(weights: Tensor, counted: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) over the n tokens that count; 0 without any."""
    square = weights.square().sum() * counted.sum()
    return weights.sum().square() / square.clamp(min=torch.finfo(weights.dtype).tiny)
