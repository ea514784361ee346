"""How much of what a step samples is trained on, as far as a method says it beforehand.

Legend: P prompts, G completions of a prompt, B = P*G.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from fastrl.config import Config
from fastrl.down_sampling import BEFORE_PACKING, SAMPLED
from fastrl.methods.axes import hyper_parameters_of, inputs_of
from fastrl.methods.estimates import selected
from fastrl.methods.inputs import StepInputs
from fastrl.methods.needs import looks_past_tokens
from fastrl.methods.record import Method
from fastrl.mini_batches import cut
from fastrl.schedules import Schedule

DRAWN = frozenset({"rewards", "groups", "lengths", "finished", "completion_advantages"})
"""What a selection may look at whose count is found out from rewards that are all different."""
RULES = frozenset({"high_entropy", "advantage_entropy", "random"})
"""Of token weights that keep a fraction of the tokens."""
SEED = 0


class Trained(NamedTuple):
    """Of the largest optimizer step of a run."""

    sizes: tuple[int, ...]  # completions of each prompt, those without any left out
    token_fraction: float  # of their tokens, that have a row at the head
    method: Method  # what is left to find out from tokens


def trained_of(config: Config, method: Method, *, is_half: bool) -> Trained:
    """What a step trains on where its rewards are all different and its completions end.

    is_half: layers compute in half precision, where what a sampler records is not exact.
    """
    last = (config.max_steps - 1) / config.max_steps
    sizes = max((_sizes(config, method, progress) for progress in (0.0, last)), key=sum)
    rule = method.token_weights
    if rule is None or not _weighs_before_packing(config, method, is_half=is_half):
        return Trained(sizes, 1.0, method)
    rest = dataclasses.replace(method, token_weights=None)
    if rule.name not in RULES:
        return Trained(sizes, 1.0, rest)
    known = {**hyper_parameters_of("token_weights", rule.name), **rule.parameters}
    fraction = known["fraction"]
    if isinstance(fraction, Schedule):
        fraction = max(fraction.at(0.0), fraction.at(last))
    return Trained(sizes, float(fraction), rest)


def _sizes(config: Config, method: Method, progress: float) -> tuple[int, ...]:
    """Completions of each prompt of the optimizer step that has the most."""
    P, G = config.prompts_per_step, config.rollout.num_generations
    groups = torch.arange(P * G) // G
    kept = torch.ones(P * G, dtype=torch.bool)
    choice = method.selection
    if choice is not None and set(inputs_of("selection", choice.name)) <= DRAWN:
        rewards = torch.rand(
            P * G, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED)
        )
        longest = config.rollout.max_completion_length
        inputs = StepInputs(
            rewards=rewards, groups=groups, lengths=torch.full((P * G,), longest), finished=kept,
            max_completion_length=longest, progress=torch.tensor(progress, dtype=torch.float64),
            completion_advantages=rewards - rewards.mean(),
        )  # fmt: skip
        kept = selected(method, inputs).lengths > 0
    parts = [groups[rows & kept] for rows in cut(groups, config.num_mini_batches)]
    counts = torch.bincount(max(parts, key=len), minlength=P)
    return tuple(counts[counts > 0].tolist())


def _weighs_before_packing(config: Config, method: Method, *, is_half: bool) -> bool:
    """As `fastrl.down_sampling.weighs_before_packing` will find with an engine that records."""
    assert method.token_weights is not None
    asked = set(inputs_of("token_weights", method.token_weights.name))
    rest = dataclasses.replace(method, token_weights=None)
    if method.loss is not None or not asked <= BEFORE_PACKING or looks_past_tokens(rest):
        return False
    shares_weights = config.rollout.engine not in ("vllm", "http")
    is_exact = shares_weights and not is_half and config.rollout.max_tokens_per_step is None
    return (
        not asked & SAMPLED
        or method.scores_from == "sampler"
        or (method.scores_from == "auto" and is_exact)
    )
