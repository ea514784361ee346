"""Truth in float64, whatever the size: all rows forward, samples of the gradients.

A float64 backward over every row and column would take longer than the benchmark. The gradient of
a row of hidden states depends on that row alone, and the gradient of a row of the weight on the
rows' log-sum-exps, so samples of both are checked exactly.

S selected tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON_LOW, EPSILON_HIGH = 0.2, 0.28
CHUNK_ROWS = 256  # float64 logits of 256 x 151936 take 300 MiB
SAMPLE = 512  # rows of each gradient that are checked; all of them where there are no more

# Largest errors of an implementation that computes the same function. They are no claim of
# accuracy, the errors themselves are in every row. In bf16 most peers round the logits, which near
# |z| = 16 moves a log-probability by up to 0.06 nats; the loss of a few tokens moves by a per cent.
TOLERANCES = {
    torch.float32: {"loss": 1e-4, "logps": 5e-3, "hidden_grad": 1e-3, "weight_grad": 1e-3},
    torch.bfloat16: {"loss": 1e-2, "logps": 0.25, "hidden_grad": 2e-2, "weight_grad": 2e-2},
}


class Outputs(NamedTuple):
    """What one call returned, detached; None where the implementation does not give it."""

    loss: Tensor | None = None
    logps: Tensor | None = None
    entropies: Tensor | None = None


class Statistics(NamedTuple):
    """(S,) each."""

    logps: Tensor
    entropies: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Errors:
    """Distances from the reference; None where there was nothing to compare."""

    loss: float | None = None
    """Relative to the sum of the tokens' absolute losses, which do not cancel."""
    logps: float | None = None
    """Largest in nats, entropies included."""
    hidden_grad: float | None = None
    """||error|| / ||reference||."""
    weight_grad: float | None = None

    def within(self, tolerances: dict[str, float]) -> bool:
        """Whether all are small enough; NaN never is."""
        pairs = ((getattr(self, name), limit) for name, limit in tolerances.items())
        return all(error <= limit for error, limit in pairs if error is not None)


class Reference(NamedTuple):
    """Float64 results of one operation; rows and columns are the samples of the gradients."""

    statistics: Statistics
    loss: float | None = None
    loss_scale: float = math.nan
    rows: Tensor | None = None
    hidden_grads: Tensor | None = None
    columns: Tensor | None = None
    weight_grads: Tensor | None = None


def token_losses(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """-min(rho A, clip(rho) A) in plain PyTorch, as TRL's and verl's trainers write it."""
    ratios = torch.exp(logps - old_logps)
    clipped = ratios.clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH)
    return -torch.minimum(ratios * advantages, clipped * advantages)


def row_statistics(
    hidden_states: Tensor, weight: Tensor, target_ids: Tensor, temperature: float,
    dtype: torch.dtype,
) -> Statistics:  # fmt: skip
    """Statistics of every row in the given dtype, a chunk of rows at a time, without gradient."""
    with torch.no_grad():
        weight = weight.to(dtype)
        chunks = zip(hidden_states.split(CHUNK_ROWS), target_ids.split(CHUNK_ROWS), strict=True)
        parts = [
            logit_statistics(hidden.to(dtype) @ weight.T / temperature, targets)
            for hidden, targets in chunks
        ]
        return Statistics(*(torch.cat(part) for part in zip(*parts, strict=True)))


def logit_statistics(logits: Tensor, target_ids: Tensor) -> Statistics:
    """Statistics of given logits (S, V), temperature included."""
    lse = logits.logsumexp(-1)
    expected_logits = (logits.softmax(-1) * logits).sum(-1)
    selected = logits.gather(-1, target_ids[:, None]).squeeze(-1)
    return Statistics(selected - lse, lse - expected_logits, lse)


def policy_reference(
    hidden_states: Tensor, weight: Tensor, target_ids: Tensor, advantages: Tensor,
    token_weights: Tensor, old_logps: Tensor, temperature: float,
) -> Reference:  # fmt: skip
    """Loss, statistics and gradients of the clipped ratio with the given token weights."""
    statistics = row_statistics(hidden_states, weight, target_ids, temperature, torch.float64)
    logps = statistics.logps.clone().requires_grad_()
    losses = token_weights * token_losses(logps, old_logps.double(), advantages.double())
    (slopes,) = torch.autograd.grad(losses.sum(), logps)
    reference = with_gradients(
        statistics, hidden_states, weight, target_ids, slopes, torch.zeros_like(slopes), temperature
    )
    return reference._replace(
        loss=float(losses.detach().sum()), loss_scale=float(losses.detach().abs().sum())
    )


def with_gradients(
    statistics: Statistics, hidden_states: Tensor, weight: Tensor, target_ids: Tensor,
    logp_slopes: Tensor, entropy_slopes: Tensor, temperature: float,
) -> Reference:  # fmt: skip
    """Gradients at sampled rows and columns, of a loss with these slopes in logps and entropies."""
    random = torch.Generator().manual_seed(0)
    num_tokens, vocab_size = hidden_states.shape[0], weight.shape[0]
    rows = torch.randperm(num_tokens, generator=random)[:SAMPLE].to(weight.device)
    columns = torch.randperm(vocab_size, generator=random)[:SAMPLE].to(weight.device)
    if vocab_size > SAMPLE:  # the gradient is largest at the targets
        columns = torch.cat([columns[: SAMPLE // 2], target_ids[rows][: SAMPLE // 2]])
    slopes = Slopes(target_ids, logp_slopes.double(), entropy_slopes.double(), statistics)
    all_columns = torch.arange(vocab_size, device=weight.device)
    with torch.no_grad():
        hidden, weight64 = hidden_states.double(), weight.double()
        hidden_grads = torch.cat([
            slopes.of_logits(hidden[few] @ weight64.T / temperature, few, all_columns) @ weight64
            for few in rows.split(CHUNK_ROWS)
        ])  # fmt: skip
        logits = hidden @ weight64[columns].T / temperature
        every_row = torch.arange(num_tokens, device=weight.device)
        weight_grads = slopes.of_logits(logits, every_row, columns).T @ hidden
    return Reference(
        statistics,
        rows=rows,
        hidden_grads=hidden_grads / temperature,
        columns=columns,
        weight_grads=weight_grads / temperature,
    )


class Slopes(NamedTuple):
    """Derivatives of a loss in logps and entropies, to be carried to the logits."""

    target_ids: Tensor
    logp_slopes: Tensor
    entropy_slopes: Tensor
    statistics: Statistics

    def of_logits(self, logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """c (onehot - p) - e p (log p + H) at the given rows and columns."""
        log_probs = logits - self.statistics.lse[rows, None]
        probs = log_probs.exp()
        hits = (columns == self.target_ids[rows, None]).double()
        centred = probs * (log_probs + self.statistics.entropies[rows, None])
        return (
            self.logp_slopes[rows, None] * (hits - probs)
            - self.entropy_slopes[rows, None] * centred
        )


def compare(
    outputs: Outputs, reference: Reference, hidden_grad: Tensor | None, weight_grad: Tensor | None
) -> Errors:
    """Errors of one call of an implementation."""
    loss = logps = None
    if outputs.loss is not None and reference.loss is not None:
        loss = abs(float(outputs.loss) - reference.loss) / reference.loss_scale
    pairs = zip(outputs[1:], reference.statistics, strict=False)
    distances = [float((got - true).abs().max()) for got, true in pairs if got is not None]
    if distances:
        logps = max(distances)
    return Errors(
        loss,
        logps,
        relative_error(hidden_grad, reference.rows, reference.hidden_grads),
        relative_error(weight_grad, reference.columns, reference.weight_grads),
    )


def relative_error(
    grad: Tensor | None, sample: Tensor | None, truth: Tensor | None
) -> float | None:
    """||grad[sample] - truth|| / ||truth||; None without a reference, NaN without a gradient."""
    if truth is None or sample is None:
        return None
    if grad is None:
        return math.nan
    return float((grad[sample].double() - truth).norm() / truth.norm())
