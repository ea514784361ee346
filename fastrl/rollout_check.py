"""Whether the engine samples from the policy that is trained: log-probabilities side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from fastrl.carried import corrects_sampler
from fastrl.errors import InputError
from fastrl.methods.needs import requirements
from fastrl.methods.record import Method
from fastrl.packing import PackedPass
from fastrl.phases import TokenStatistics
from fastrl.policy import Policy
from fastrl.rollout import Engine, Sampling
from fastrl.rollout_causes import (
    Cause,
    cause_of,
    follows_training,
    is_half,
    mean_gap,
    trainer_forward,
)
from fastrl.types import Prompts, Rollouts, StepMetrics
from fastrl_kernels import PolicyLoss

TOLERANCE = 1e-3
"""Nats, mean over tokens. Two ways through one model in float32 differ by 1e-6 to 1e-5; a
temperature of 0.99 instead of 1 already makes about 1e-2."""
TOLERANCE_BF16 = 5e-2
"""The same under bfloat16, whose 8 bits make 0.2% to 0.4% of logits of size 10: 0.02 to 0.04."""
LENGTH = 16
"""Tokens of a completion that are compared."""
GENERATIONS = 4
"""Completions of a prompt at most: some may end at once."""


class Comparison(NamedTuple):
    """The engine's log-probabilities beside the trainer's, of the same tokens."""

    gap: float  # nats, mean over tokens of the absolute difference
    tolerance: float
    num_tokens: int
    cause: Cause | None  # None within the tolerance


def check_engine(
    engine: Engine, policy: Policy, prompts: Prompts, sampling: Sampling,
    generator: torch.Generator, method: Method, *, name: str,
) -> list[str]:  # fmt: skip
    """Let the engine answer two prompts; returns what the user should know.

    Raises InputError where its log-probabilities are not those of the trainer and nothing in the
    method makes up for it, with the cause. name: of the engine.
    """
    short = replace(
        sampling,
        num_generations=min(sampling.num_generations, GENERATIONS),
        max_completion_length=min(sampling.max_completion_length, LENGTH),
    )
    first_two = Prompts(prompts.token_ids[:2], prompts.examples[:2])
    found = compare(engine, policy, engine.generate(first_two, short, generator), short)
    if found is None:
        if needs_rollout_logps(method):
            raise InputError(
                f"method {method.name!r} needs the sampler's log-probabilities, but rollout.engine "
                f"{name!r} records none; choose another engine, or do without rollout_correction"
            )
        return [
            f"rollout.engine {name!r} records no log-probabilities: nothing can tell whether it "
            "samples from the policy"
        ]
    if found.cause is not None and not _is_corrected(engine, method, found):
        raise InputError(
            f"rollout.engine {name!r} does not sample from the policy: log-probabilities of the "
            f"same {found.num_tokens} tokens differ by {found.gap:.3g} nats on average, where "
            f"{found.tolerance:g} is rounding. Cause: {found.cause.name}: {found.cause.text}"
        )
    return list(_notes(engine, sampling, method, found, name))


def compare(
    engine: Engine, policy: Policy, rollouts: Rollouts, sampling: Sampling
) -> Comparison | None:
    """The engine's log-probabilities against those of the trainer; None if it recorded none."""
    if rollouts.rollout_logps is None:
        return None
    recorded = torch.cat(rollouts.rollout_logps).to(policy.device)
    forward = trainer_forward(policy, rollouts, sampling.temperature)
    recorded = recorded.to(forward.logps)
    gap = mean_gap(recorded, forward.logps)
    tolerance = TOLERANCE_BF16 if is_half(policy) else TOLERANCE
    cause = None
    if not gap <= tolerance:  # NaN is no agreement
        cause = cause_of(engine, policy, rollouts, sampling, recorded, forward, tolerance)
    return Comparison(gap, tolerance, len(recorded), cause)


def needs_rollout_logps(method: Method) -> bool:
    """Whether the loss looks at what tokens were drawn with."""
    return method.ratio_to_sampler or "rollout_logps" in requirements(method)


def sampler_gap(
    passes: Sequence[PackedPass], looks: Sequence[PolicyLoss | TokenStatistics]
) -> StepMetrics:
    """Sampler against policy before its first update, over the trained tokens.

    Of methods whose old policy is the sampler too, where their ratios would show nothing else.
    """
    gaps = [
        (out.logps.double() - item.batch.rollout_logps.double()).abs()
        for item, out in zip(passes, looks, strict=True)
        if item.batch.rollout_logps is not None
    ]
    if not gaps:
        return {}
    found = torch.cat(gaps)
    return {
        "sampling/sampling_logp_difference/mean": float(found.mean()),
        "sampling/sampling_logp_difference/max": float(found.max()),
    }


def _is_corrected(engine: Engine, method: Method, found: Comparison) -> bool:
    """Whether the gap is what corrections are for: a copy of the weights, or its rounding."""
    assert found.cause is not None
    is_copy = found.cause.name == "weights" and not follows_training(engine)
    is_rounding = found.cause.name == "dtype" and found.gap <= TOLERANCE_BF16
    return corrects_sampler(method) and (is_copy or is_rounding)


def _notes(
    engine: Engine, sampling: Sampling, method: Method, found: Comparison, name: str
) -> Iterator[str]:
    """What makes completions off-policy without being a mistake."""
    advice = (
        "set objective.rollout_correction (for example truncated_tokens) to weigh tokens for it"
    )
    if found.cause is not None:
        yield (
            f"log-probabilities of rollout.engine {name!r} and the trainer differ by "
            f"{found.gap:.3g} nats on average ({found.cause.name}), which the method corrects for"
        )
    elif not corrects_sampler(method) and not follows_training(engine):
        yield (
            f"rollout.engine {name!r} samples from a copy of the weights, and method "
            f"{method.name!r} does not correct for one that stays behind; {advice}, or let "
            "rollout.engine_args.check_steps look for it"
        )
    elif not corrects_sampler(method) and found.gap > TOLERANCE:
        yield (
            f"log-probabilities of rollout.engine {name!r} and the trainer differ by "
            f"{found.gap:.3g} nats on average from rounding; {advice}"
        )
    if not sampling.is_exact:
        yield (
            "tokens are drawn after truncation or a repetition penalty, but log-probabilities are "
            "of the whole softmax(logits / temperature): no rollout_correction undoes that"
        )
