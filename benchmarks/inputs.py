"""Inputs of the benchmarks, made to look like those of a policy update; one seed, one input.

S selected tokens, D hidden, V vocabulary, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from reference import row_statistics
from torch import Tensor

MEAN_LOGP = -0.5  # nats: about what a policy gives to the tokens it sampled itself
NUM_SEQUENCES = 8  # B; peers with one advantage a sequence see rows of them, padded
TEMPERATURE = 1.0  # not every peer has one, and dividing the logits would cost the others a copy
SPREAD = 0.6  # of log-normal lengths: the longest of 16 is about 2 times the mean


def log_normal_lengths(mean: int, count: int, spread: float) -> list[int]:
    """Lengths of this mean, at least 1, always the same ones; all alike at a spread of 0.

    spread: standard deviation of their logarithm. They sum to mean * count.
    """
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(count, generator=random, dtype=torch.float64).mul(spread).exp()
    ends = (weights.cumsum(0) / weights.sum() * mean * count).round().long().tolist()
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert min(lengths) >= 1, "a spread this wide leaves sequences without tokens"
    return lengths


@dataclass(frozen=True)
class Shape:
    """What a case is large in."""

    num_tokens: int
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device: str
    spread: float = 0.0
    """Of the lengths of the sequences, see log_normal_lengths."""

    def __str__(self) -> str:
        """S, V, D and the dtype, as a case is named."""
        dtype = str(self.dtype).removeprefix("torch.")
        lengths = f" log-normal {self.spread:g}" if self.spread else ""
        return f"S={self.num_tokens}{lengths} V={self.vocab_size} D={self.hidden_size} {dtype}"

    @property
    def lengths(self) -> list[int]:
        """Of the B sequences."""
        return log_normal_lengths(self.num_tokens // NUM_SEQUENCES, NUM_SEQUENCES, self.spread)


class Inputs(NamedTuple):
    """Everything a policy loss takes, and random upstream slopes for losses of the caller's own."""

    hidden_states: Tensor  # (S, D), requires grad
    weight: Tensor  # (V, D), requires grad
    target_ids: Tensor  # (S,)
    advantages: Tensor  # (S,), one value a sequence, or 0 where a token is not trained
    token_weights: Tensor  # (S,), all 1 / S: the mean over tokens
    old_logps: Tensor  # (S,)
    logp_slopes: Tensor  # (S,)
    entropy_slopes: Tensor  # (S,)
    lengths: list[int]  # of the B sequences, S together


def make_inputs(shape: Shape, *, share_trained: float = 1.0, seed: int = 0) -> Inputs:
    """Peaked logits of mean logp MEAN_LOGP, and old log-probabilities of which 5% are clipped.

    share_trained: share of tokens with a nonzero advantage, drawn at random.
    """
    num_tokens, device = shape.num_tokens, shape.device
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device)

    weight = (normal(shape.vocab_size, shape.hidden_size) / shape.hidden_size**0.5).to(shape.dtype)
    target_ids = torch.randint(shape.vocab_size, (num_tokens,), generator=random, device=device)
    noise = normal(num_tokens, shape.hidden_size)
    hidden_states = _peaked(weight, target_ids, noise)
    logps = row_statistics(hidden_states, weight, target_ids, TEMPERATURE, torch.float32).logps
    sequence_advantages = normal(NUM_SEQUENCES)
    sequence_advantages = sequence_advantages - sequence_advantages.mean()
    lengths = shape.lengths
    advantages = sequence_advantages.repeat_interleave(torch.tensor(lengths, device=device))
    order = torch.randperm(num_tokens, generator=random, device=device)
    advantages[order[round(share_trained * num_tokens) :]] = 0.0
    return Inputs(
        hidden_states.requires_grad_(),
        weight.requires_grad_(),
        target_ids,
        advantages,
        torch.full((num_tokens,), 1 / num_tokens, device=device),
        logps + _drift(num_tokens, random),
        normal(num_tokens) / num_tokens,
        normal(num_tokens) / num_tokens,
        lengths,
    )


class LogitInputs(NamedTuple):
    """Inputs of functions that start from logits."""

    logits: Tensor  # (S, V), the first S rows of S + 1, which one peer wants to see
    target_ids: Tensor  # (S,)
    logp_slopes: Tensor  # (S,)
    entropy_slopes: Tensor  # (S,)


def make_logits(shape: Shape, *, seed: int = 0) -> LogitInputs:
    """Logits of unit spread, the target's raised until the mean logp is MEAN_LOGP."""
    num_tokens, vocab_size, device = shape.num_tokens, shape.vocab_size, shape.device
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device)

    padded = torch.empty(num_tokens + 1, vocab_size, dtype=shape.dtype, device=device)
    for rows in padded.split(256):  # all of them in float32 would take twice the logits' memory
        rows.copy_(normal(*rows.shape))
    target_ids = torch.randint(vocab_size, (num_tokens,), generator=random, device=device)
    sample, targets = padded[:128].float(), target_ids[:128, None]

    def mean_logp(margin: float) -> float:
        margins = torch.full(targets.shape, margin, device=device)
        log_probs = sample.scatter_add(1, targets, margins).log_softmax(-1)
        return float(log_probs.gather(1, targets).mean())

    logits = padded[:num_tokens]
    margins = torch.full((num_tokens, 1), _bisect(mean_logp), dtype=shape.dtype, device=device)
    logits.scatter_add_(1, target_ids[:, None], margins)
    slopes = [normal(num_tokens) / num_tokens for _ in range(2)]
    return LogitInputs(logits, target_ids, *slopes)


def _peaked(weight: Tensor, target_ids: Tensor, noise: Tensor) -> Tensor:
    """alpha * W[target] + noise (S, D) in the weight's dtype, alpha found on the first 128 rows."""

    def mix(alpha: float, rows: slice) -> Tensor:
        return (alpha * weight[target_ids[rows]].float() + noise[rows]).to(weight.dtype)

    few = slice(0, 128)

    def mean_logp(alpha: float) -> float:
        hidden_states = mix(alpha, few)
        statistics = row_statistics(
            hidden_states, weight, target_ids[few], TEMPERATURE, torch.float32
        )
        return float(statistics.logps.mean())

    return mix(_bisect(mean_logp), slice(None))


def _bisect(mean_logp: Callable[[float], float]) -> float:
    low, high = 0.0, 40.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_logp(middle) < MEAN_LOGP else (low, middle)
    return (low + high) / 2


def _drift(num_tokens: int, random: torch.Generator) -> Tensor:
    """Old minus new log-probability: within 0.1, and 0.6 for every twentieth token.

    None comes near a clip boundary (log 0.8 = -0.22, log 1.28 = 0.25), where the slope jumps and an
    honest rounding of the logits would turn a whole row of the gradient on or off.
    """
    drift = torch.rand(num_tokens, generator=random, device=random.device) * 0.2 - 0.1
    drift[::40], drift[20::40] = 0.6, -0.6
    return drift
