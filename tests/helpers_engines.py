"""What tests of rollout engines share: prompts, and what must have been drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.policy import Policy
from fastrl.rollout import Sampling
from fastrl.types import Example, Prompts, Rollouts
from tests.helpers import random_ids


def prompts_of(lengths: Sequence[int], seed: int = 0) -> Prompts:
    """Random prompts of these lengths."""
    ids = random_ids(lengths, seed=seed, vocab_size=250)
    return Prompts(tuple(ids), tuple(Example(prompt="x") for _ in ids))


def generator(seed: int = 0) -> torch.Generator:
    """A private random stream."""
    return torch.Generator().manual_seed(seed)


def all_logps(policy: Policy, rollouts: Rollouts, sampling: Sampling, b: int) -> Tensor:
    """(C, V) float64 log_softmax(logits / temperature) of row b, from a plain forward pass."""
    prompt = rollouts.prompts.token_ids[b // sampling.num_generations]
    with torch.no_grad():
        ids = torch.cat([prompt, rollouts.completion_ids[b]])[None].to(policy.device)
        logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].cpu()
    return (logits.double() / (sampling.temperature or 1.0)).log_softmax(-1)


def worst_gap(policy: Policy, rollouts: Rollouts, sampling: Sampling) -> float:
    """The furthest that a recorded log-probability is from that of a plain forward pass."""
    assert rollouts.rollout_logps is not None
    gaps = []
    for b, (ids, logps) in enumerate(
        zip(rollouts.completion_ids, rollouts.rollout_logps, strict=True)
    ):
        expected = all_logps(policy, rollouts, sampling, b).gather(1, ids[:, None])[:, 0]
        gaps.append(float((logps.double() - expected).abs().max()))
    return max(gaps)


def same_completions(first: Rollouts, second: Rollouts) -> bool:
    """Whether all completions are the same, row by row."""
    pairs = zip(first.completion_ids, second.completion_ids, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
