"""pass@k on held-out prompts.

Legend: P prompts, n samples of a prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.conversations import Answer, roll_out
from fastrl.encoding import decode_completions
from fastrl.rewards import Scorer
from fastrl.rollout import Engine, Sampling
from fastrl.sampler import Generated
from fastrl.types import Prompts, Rollouts, StepMetrics

PROMPTS_PER_BATCH = 128
"""Prompts sampled at a time: bounds the memory of an evaluation of any size."""


@dataclass(frozen=True)
class Evaluation:
    """What a policy scores on the held-out prompts."""

    pass_at: dict[int, float]  # k -> unbiased estimate of pass@k, for the powers of two up to n
    mean_reward: float
    mean_length: float  # tokens
    finished_fraction: float
    num_prompts: int
    num_samples: int

    @property
    def metrics(self) -> StepMetrics:
        """The same numbers under the names of the logs."""
        return {
            **{f"eval_pass@{k}": value for k, value in self.pass_at.items()},
            "eval_reward": self.mean_reward,
            "eval_completions/mean_length": self.mean_length,
            "eval_completions/clipped_ratio": 1.0 - self.finished_fraction,
        }


def evaluate_policy(
    engine: Engine, tokenizer: Any, prompts: Prompts, scorer: Scorer,
    sampling: Sampling, generator: torch.Generator, *, answer: Answer, pass_threshold: float,
) -> Evaluation:  # fmt: skip
    """Sample `sampling.num_generations` completions a prompt and score them like in training.

    A completion passes when its total reward reaches `pass_threshold`. answer: the later turns of
    conversations, whose last answers are what is measured.
    """
    totals, lengths, finished = [], [], []
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        stop = start + PROMPTS_PER_BATCH
        part = Prompts(prompts.token_ids[start:stop], prompts.examples[start:stop])
        sampled: Rollouts = engine.generate(part, sampling, generator)
        texts = decode_completions(sampled.completion_ids, tokenizer)
        rollouts, texts = roll_out(Generated(sampled, texts), answer)
        totals.append(scorer.score(rollouts, texts).total)
        lengths.append(rollouts.lengths)
        finished.append(rollouts.finished)
    total = torch.cat(totals)
    passed = total.view(len(prompts), -1) >= pass_threshold
    return Evaluation(
        pass_at={k: pass_at_k(passed, k) for k in powers_of_two(sampling.num_generations)},
        mean_reward=float(total.mean()),
        mean_length=float(torch.cat(lengths).double().mean()),
        finished_fraction=float(torch.cat(finished).double().mean()),
        num_prompts=len(prompts),
        num_samples=sampling.num_generations,
    )


def pass_at_k(passed: Tensor, k: int) -> float:
    """Unbiased pass@k, 1 - C(n - c, k) / C(n, k) averaged over prompts (arXiv:2107.03374 eq. 1).

    passed: (P, n) bool, c of the n samples of a prompt passed; 1 <= k <= n.
    """
    num_samples = passed.shape[1]
    if not 1 <= k <= num_samples:
        raise ValueError(f"expected k from 1 to the {num_samples} samples of a prompt, got {k}")
    correct = passed.sum(dim=1).tolist()
    misses = [math.comb(num_samples - c, k) / math.comb(num_samples, k) for c in correct]
    return 1.0 - math.fsum(misses) / len(misses)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to `limit`."""
    return [2**exponent for exponent in range(limit.bit_length())]
