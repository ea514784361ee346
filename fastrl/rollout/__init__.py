"""Prompts to completions. An engine is one method; later engines plug in beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from fastrl.errors import InputError, nearest
from fastrl.policy import Policy
from fastrl.types import Prompts, Rollouts


@dataclass(frozen=True)
class Sampling:
    """How to draw a completion; log-probabilities are of softmax(logits / temperature)."""

    num_generations: int
    max_completion_length: int
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0


class Engine(Protocol):
    """Samples from the policy's current weights."""

    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator
    ) -> Rollouts:
        """G completions of every prompt, row b = p*G + g, drawn from `generator`."""
        ...


ENGINES = ("generate",)


def make_engine(name: str, policy: Policy) -> Engine:
    """The engine of that name over the training weights."""
    if name not in ENGINES:
        raise InputError(f"unknown rollout.engine {name!r}; {nearest(name, list(ENGINES))}")
    from fastrl.rollout.generate import GenerateEngine

    return GenerateEngine(policy)
