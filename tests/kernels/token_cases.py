"""Inputs for the tests of token_loss."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels import TokenLoss, token_loss
from fastrl_kernels.objectives import Objective, Regulariser, clipped_ratio, k3

S = 257
CLIP = Objective(clipped_ratio, (0.2, 0.28), (Regulariser(k3, 0.07),))


class Tokens(NamedTuple):
    """The tensors of one call."""

    logps: Tensor
    entropies: Tensor
    advantages: Tensor
    token_weights: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    rollout_weights: Tensor | None


def make_tokens(seed: int, num_tokens: int = S, dtype: torch.dtype = torch.float64) -> Tokens:
    """Every seventh token without weight, the log-ratios wide enough to clip many."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(num_tokens, generator=generator, dtype=torch.float64)

    logps = -3 * normal().abs()
    weights = normal().abs() / max(1, num_tokens)
    weights[3::7] = 0
    advantages = normal()
    advantages[5::11] = 0
    tokens = (logps, normal().abs(), advantages, weights, logps + 0.4 * normal())
    tokens = (*tokens, logps - 0.4 * normal(), normal().abs())
    return Tokens._make(x.to(dtype) for x in tokens)


def call(tokens: Tokens, function: Any = token_loss, **settings: Any) -> TokenLoss:
    settings = {"objective": CLIP, "entropy_coef": 0.03, **settings}
    return function(
        *tokens[:4], old_logps=tokens.old_logps, ref_logps=tokens.ref_logps,
        rollout_weights=tokens.rollout_weights, **settings,
    )  # fmt: skip
