"""Prompts to completions. An engine is one method; each lives in a file beside this one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.errors import InputError, nearest
from fastrl.policy import Policy
from fastrl.thinking import ThinkingLimit
from fastrl.types import Prompts, Rollouts

OnCompletion = Callable[[int, Tensor], None]
"""Called with the row b = p*G + g and the token ids of a completion as soon as it has ended."""


@dataclass(frozen=True)
class Sampling:
    """How to draw a completion; log-probabilities are of softmax(logits / temperature)."""

    num_generations: int
    max_completion_length: int
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of logits of tokens that the prompt or completion has
    stop_strings: tuple[str, ...] = ()  # a completion ends with the token that completes one
    thinking: ThinkingLimit | None = None  # where completions think no longer

    @property
    def is_exact(self) -> bool:
        """Whether tokens are drawn from softmax(logits / temperature) itself."""
        return (
            self.temperature > 0.0
            and self.top_p == 1.0
            and self.top_k == 0
            and self.min_p == 0.0
            and self.repetition_penalty == 1.0
        )


class Engine(Protocol):
    """Samples from the policy's current weights."""

    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts:  # fmt: skip
        """G completions of every prompt, row b = p*G + g, drawn from `generator`."""
        ...


ENGINES = {
    "native": "fastrl.rollout.native:NativeEngine",
    "generate": "fastrl.rollout.generate:GenerateEngine",
    "hf_cb": "fastrl.rollout.continuous_batching:ContinuousBatchingEngine",
    "vllm": "fastrl.rollout.vllm:VLLMEngine",
    "http": "fastrl.rollout.http:HTTPEngine",
}
"""Where the class of each engine lives: called with the policy and rollout.engine_args."""
CHECK_STEPS = "check_steps"
"""Of rollout.engine_args, whatever the engine."""


def check_interval(arguments: Mapping[str, Any]) -> int:
    """Steps between two comparisons of the engine's log-probabilities with the trainer's, of
    rollout.engine_args; 0: only before the first step.
    """
    steps = arguments.get(CHECK_STEPS, 0)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(
            f"rollout.engine_args.{CHECK_STEPS} must be a whole number of at least 0, got {steps!r}"
        )
    return steps


def make_engine(name: str, policy: Policy, arguments: Mapping[str, Any] | None = None) -> Engine:
    """The engine of that name over the training weights."""
    if name not in ENGINES:
        raise InputError(f"unknown rollout.engine {name!r}; {nearest(name, list(ENGINES))}")
    module, _, class_name = ENGINES[name].partition(":")
    engine = getattr(importlib.import_module(module), class_name)
    own = dict(arguments or {})
    check_interval(own)
    own.pop(CHECK_STEPS, None)
    try:
        made: Engine = engine(policy, **own)
    except TypeError as error:
        raise InputError(f"rollout.engine_args do not fit engine {name!r}: {error}") from error
    return made
