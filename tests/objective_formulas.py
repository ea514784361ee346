"""Objectives as their papers write them, in plain Python for one token, and made-up tokens."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.objectives import SURROGATES, bind_torch

HYPER: dict[str, tuple[float, ...]] = {
    "clipped_ratio": (0.2, 0.28),
    "dual_clipped_ratio": (0.2, 0.28, 3.0),
    "bounded_ratio": (0.7, 1.5, 3.0),
    "two_sided_clipped_ratio": (0.2, 0.28, 3.0),
    "masked_ratio": (0.5, 2.0),
    "one_sided_masked_ratio": (0.8, 1.28),
    "probability_masked_ratio": (0.02, 0.03),
    "truncated_importance": (1.0, 4.0),
    "tapered": (-0.5,),
    "soft_gated_ratio": (1.0, 1.05),
    "quadratic_ratio": (0.2,),
    "kl_penalised_ratio": (0.1,),
    "mirror_descent": (0.5,),
    "drift": (2.0, 0.6),
    "shaped_probability": (0.1,),
    "shaped_probability_ratio": (0.1,),
    "negative_aware": (0.4,),
}
"""Of those that have any: the published values where they act on made-up tokens."""


def clamp(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def log_ratio(logp: float, other: float) -> float:
    return clamp(logp - other, -20.0, 20.0)


def rho(logp: float, other: float) -> float:
    return math.exp(log_ratio(logp, other))


def ppo(ratio: float, advantage: float, low: float, high: float) -> float:
    return min(ratio * advantage, clamp(ratio, low, high) * advantage)


def dual(ratio: float, advantage: float, low: float, high: float, dual_clip: float) -> float:
    value = ppo(ratio, advantage, low, high)
    return max(value, dual_clip * advantage) if advantage < 0 else value


def one_sided(ratio: float, advantage: float, low: float, high: float) -> float:
    gone = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
    return 0.0 if gone else ratio * advantage


def dppo(logp: float, old: float, advantage: float, low: float, high: float) -> float:
    moved = math.exp(logp) - math.exp(old)
    gone = (advantage > 0 and moved > high) or (advantage < 0 and moved < -low)
    return 0.0 if gone else rho(logp, old) * advantage


def sapo(ratio: float, advantage: float, positive: float, negative: float) -> float:
    temperature = positive if advantage > 0 else negative
    gate = 1 / (1 + math.exp(-min(temperature * (ratio - 1), 700.0)))
    return 4 / temperature * gate * advantage


def discovered(d: float, advantage: float, alpha: float, beta: float) -> float:
    u, v = (math.exp(d) - 1) * advantage, d * advantage
    if advantage >= 0:
        pull = max(0.0, u - alpha * math.tanh(u / alpha))
    else:
        pull = max(0.0, v - beta * math.tanh(v / beta))
    return math.exp(d) * advantage - pull


def share(probability: float, gamma: float) -> float:
    return probability / (probability + gamma)


def nft(d: float, advantage: float, pass_rate: float) -> float:
    if advantage == 0:
        return 0.0
    ratio, rate = math.exp(clamp(d, -20.0, 10.0)), clamp(pass_rate, 0.02, 0.98)
    return math.log(ratio if advantage > 0 else max(1.0, (1 - rate * ratio) / (1 - rate)))


SURROGATE_FORMULAS: dict[str, Callable[..., float]] = {
    "policy_gradient": lambda x, y, a: a * x,
    "log_likelihood": lambda x, y, a: x,
    "importance_ratio": lambda x, y, a: rho(x, y) * a,
    "clipped_ratio": lambda x, y, a, low, high: ppo(rho(x, y), a, 1 - low, 1 + high),
    "dual_clipped_ratio": lambda x, y, a, low, high, c: dual(rho(x, y), a, 1 - low, 1 + high, c),
    "bounded_ratio": lambda x, y, a, low, high, c: dual(rho(x, y), a, low, high, c),
    "two_sided_clipped_ratio": lambda x, y, a, low, high, delta: min(
        min(rho(x, y), delta) * a, clamp(rho(x, y), 1 - low, 1 + high) * a
    ),
    "masked_ratio": lambda x, y, a, low, high: rho(x, y) * a * (low <= rho(x, y) <= high),
    "one_sided_masked_ratio": lambda x, y, a, low, high: one_sided(rho(x, y), a, low, high),
    "probability_masked_ratio": dppo,
    "truncated_importance": lambda x, y, a, low, high: clamp(rho(x, y), 1 - low, 1 + high) * a * x,
    "tapered": lambda x, y, a, r: a * x if r > 0 else clamp(rho(x, y), 0.0, 1.0) * a * x,
    "soft_gated_ratio": lambda x, y, a, plus, minus: sapo(rho(x, y), a, plus, minus),
    "quadratic_ratio": lambda x, y, a, epsilon: (
        rho(x, y) * a - abs(a) * (rho(x, y) - 1) ** 2 / (2 * epsilon)
    ),
    "kl_penalised_ratio": lambda x, y, a, beta: (
        rho(x, y) * a - beta * (rho(x, y) - 1 - log_ratio(x, y))
    ),
    "mirror_descent": lambda x, y, a, eta: (
        rho(x, y) * a - (rho(x, y) * log_ratio(x, y) - rho(x, y) + 1) / eta
    ),
    "drift": lambda x, y, a, alpha, beta: discovered(log_ratio(x, y), a, alpha, beta),
    "shaped_probability": lambda x, y, a, gamma: a * share(math.exp(x), gamma),
    "shaped_probability_ratio": lambda x, y, a, gamma: (
        a * share(math.exp(y + log_ratio(x, y)), gamma) / share(math.exp(y), gamma)
    ),
    "negative_aware": lambda x, y, a, rate: nft(x - y, a, rate),
    "linear_bound": lambda x, y, a: a * (1 + x - y) if a >= 0 else a * rho(x, y),
}


def schulman(delta: float) -> float:
    delta = clamp(delta, -20.0, 20.0)
    return math.exp(-delta) - 1 + delta


REGULARISER_FORMULAS: dict[str, Callable[..., float]] = {
    "k1_score": lambda x, y: (x - y) * x,
    "k2": lambda x, y: (x - y) ** 2 / 2,
    "k3": lambda x, y: schulman(x - y),
    "k3_old": lambda x, y: schulman(x - y),
    "k3_plus": lambda x, y: schulman(x - y),
    "k3_is": lambda x, y, z: rho(x, y) * schulman(x - z),
    "k2_is": lambda x, y, z: rho(x, y) * (x - z) ** 2 / 2,
    "absolute": lambda x, y: abs(x - y),
    "absolute_old": lambda x, y: abs(x - y),
    "squared_old": lambda x, y: (x - y) ** 2,
    "entropy_sample": lambda x, y: x * x,
    "negative_log_likelihood": lambda x, y: -x,
    "chi_squared_likelihood": lambda x, y: -((x - y) - (x - y) ** 2 / 4),
    "hellinger_likelihood": lambda x, y: -(1 - rho(y, x)),
    "jensen_shannon_likelihood": lambda x, y: math.log1p(math.exp(y - x)),
}


class Tokens(NamedTuple):
    """(S,) each, float64."""

    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor


def make_tokens(num_tokens: int = 257) -> Tokens:
    """Log-ratios that reach past most bounds on both sides; three clamped or 0, one A of 0."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(num_tokens, generator=generator, dtype=torch.float64)

    logps = -2.5 * normal().abs()
    old_logps, ref_logps = logps - 0.7 * normal(), logps - 0.7 * normal()
    outside = torch.tensor([25.0, -25.0, 0.0], dtype=torch.float64)[:num_tokens]
    for other in (old_logps, ref_logps):
        other[:3] = logps[:3] + outside
    advantages = normal()
    advantages[5:6] = 0.0
    return Tokens(logps, old_logps, ref_logps, advantages)


def run(name: str, *tokens: Tensor, hyper: tuple[Any, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Value and slope of a surrogate; the parameters are those of HYPER unless given."""
    function = bind_torch(SURROGATES[name])
    return function(*tokens, *(HYPER.get(name, ()) if hyper is None else hyper))


def close(value: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
