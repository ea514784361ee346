"""The update that is measured: random tokens of the asked lengths, and what their method trains.

Legend: P prompts, G num_generations, B = P*G completions, R most tokens of a completion.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.config import Config
from fastrl.config_io import objective_of
from fastrl.down_sampling import check_scores, weigh_tokens, weighs_before_packing
from fastrl.methods.checks import check_generations, check_sizes
from fastrl.methods.estimates import rows_to_train
from fastrl.methods.needs import estimates_from_tokens, looks_past_tokens
from fastrl.methods.record import Method
from fastrl.methods.resolve import resolve_method
from fastrl.packing import PackedPass, pack_rollouts
from fastrl.phases import start_inputs
from fastrl.selection import counted_lengths
from fastrl.types import Example, Prompts, Rewards, Rollouts

SPREAD = 0.6  # standard deviation of the logarithm of a completion's length
MEAN_SHARE = 0.5  # of the longest, which completions have on average


class Workload(NamedTuple):
    """Completions with all that the loss of an update needs of them."""

    rollouts: Rollouts
    advantages: Tensor  # (B,)
    weights: tuple[Tensor, ...]  # of every token of each completion; 0 where none is trained
    kept: Tensor  # (B,) bool: completions with a gradient
    drops_tokens: bool
    method: str

    @property
    def num_tokens(self) -> int:
        """Of completions."""
        return int(self.rollouts.lengths.sum())


class Layout(NamedTuple):
    """How completions become passes; the budget is in packed tokens."""

    max_tokens_per_pass: int
    head_row_cost: float
    device: torch.device
    dtype: torch.dtype


def make_workload(
    config: Config, *, vocab_size: int, is_fixed_length: bool, zero_spread: float
) -> Workload:
    """A function of the seed. Rewards are 0 and 1 by turns, and alike for every completion of
    `zero_spread` of the prompts: GRPO and its kin have no gradient there.
    """
    rollouts = _rollouts(config, vocab_size=vocab_size, is_fixed_length=is_fixed_length)
    method = _measurable(config, rollouts)
    P, G = len(rollouts.prompts), rollouts.num_generations
    total = (torch.arange(P * G) % 2).float()
    total[: G * min(round(zero_spread * P), P - 1)] = 1.0
    rewards = Rewards(total, {"task": total})
    lengths = counted_lengths(
        rollouts, mask_truncated_completions=method.mask_truncated_completions
    )
    inputs = start_inputs(
        rollouts, rewards, lengths, progress=0.0, generator=_generator(config, 2),
        max_completion_length=config.rollout.max_completion_length,
        reward_scale=total.double().std(),
    )  # fmt: skip
    inputs, advantages, kept = rows_to_train(method, inputs)
    found = weigh_tokens(
        method, rollouts, inputs, kept, scores_from=method.scores_from, is_exact=True
    )
    weights = found.weights
    if isinstance(weights, Tensor):
        per_token = weights.repeat_interleave(rollouts.lengths).split(rollouts.lengths.tolist())
    else:
        per_token = tuple(weights)
    return Workload(
        rollouts, advantages, per_token, found.kept, not isinstance(weights, Tensor), method.name
    )


def packed_passes(work: Workload, layout: Layout, *, shares: bool, drops: bool) -> list[PackedPass]:
    """The update as packed rows. drops: tokens without a gradient have no row at the head, and what
    only they need is not encoded.
    """
    B, lengths = len(work.advantages), work.rollouts.lengths
    kept, weights = torch.ones(B, dtype=torch.bool), torch.ones(B, dtype=torch.float64)
    given: Tensor | list[Tensor] = weights
    if drops:
        kept, given = work.kept, list(work.weights)
        if not work.drops_tokens:
            given = torch.stack([row[0] if len(row) else torch.zeros(()) for row in given])
    passes = pack_rollouts(
        work.rollouts, kept, work.advantages, given,
        max_tokens_per_pass=layout.max_tokens_per_pass, device=layout.device, dtype=layout.dtype,
        head_row_cost=layout.head_row_cost,
        **({} if shares else {"min_token_ratio": float("inf")}),
    )  # fmt: skip
    if drops:
        return passes
    flat, starts = torch.cat(work.weights), lengths.cumsum(0) - lengths
    return [_with_weights(item, flat, starts) for item in passes]


def padded_rows(work: Workload, layout: Layout) -> list[range]:
    """The completions of each pass of padded rows; as many as fit, but at least one."""
    total, width = len(work.advantages), padded_width(work)
    size = max(1, layout.max_tokens_per_pass // width)
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def padded_width(work: Workload) -> int:
    """Tokens of the longest prompt with the longest completion."""
    prompts = max(len(ids) for ids in work.rollouts.prompts.token_ids)
    return prompts + int(work.rollouts.lengths.max())


def _with_weights(item: PackedPass, flat: Tensor, starts: Tensor) -> PackedPass:
    """The pass with the weights of its tokens, each completion whole and in its place."""
    owners = item.batch.completion_index.unique_consecutive().tolist()
    sizes = item.plan.completion_lengths
    weights = torch.cat(
        [flat[int(starts[b]) :][:size] for b, size in zip(owners, sizes, strict=True)]
    )
    batch = dataclasses.replace(item.batch, token_weights=weights.to(item.batch.token_weights))
    return PackedPass(item.plan, batch)


def _measurable(config: Config, rollouts: Rollouts) -> Method:
    """The config's method where its weights are known before tokens are; GRPO for the others."""
    method = resolve_method(config.method, objective_of(config))
    sizes = {
        "num_generations": config.rollout.num_generations,
        "max_completion_length": config.rollout.max_completion_length,
    }
    check_generations(method, config.rollout.num_generations)
    check_sizes(method, **sizes, num_rewards=len(config.rewards))
    check_scores(method, method.scores_from)
    weighs = weighs_before_packing(
        method, rollouts, scores_from=method.scores_from, is_exact=True
    ) or not looks_past_tokens(method)
    has_own_values = method.prompt_values is not None or estimates_from_tokens(method)
    if not weighs or has_own_values or method.loss is not None:
        return resolve_method("grpo", objective_of(Config()))
    return method


def _rollouts(config: Config, *, vocab_size: int, is_fixed_length: bool) -> Rollouts:
    """Random tokens; log-probabilities and entropies as if a sampler had recorded some."""
    P, G = config.prompts_per_step, config.rollout.num_generations
    generator = _generator(config, 0)
    longest = config.rollout.max_completion_length
    lengths = [longest] * (P * G)
    if not is_fixed_length:
        lengths = ragged_lengths(P * G, longest, _generator(config, 1)).tolist()

    def ids(length: int) -> Tensor:
        return torch.randint(vocab_size, (length,), generator=generator)

    completions = tuple(ids(length) for length in lengths)
    entropies = tuple(torch.rand(length, generator=generator) for length in lengths)
    prompts = tuple(ids(config.rollout.max_prompt_length) for _ in range(P))
    return Rollouts(
        prompts=Prompts(prompts, tuple(Example(str(index)) for index in range(P))),
        completion_ids=completions,
        rollout_logps=tuple(-value for value in entropies),
        rollout_entropies=entropies,
        finished=torch.ones(P * G, dtype=torch.bool),
    )


def ragged_lengths(num_completions: int, longest: int, generator: torch.Generator) -> Tensor:
    """(B,) log-normal, at most `longest`, the mean half of that or one token away from it."""
    spread = (SPREAD * torch.randn(num_completions, generator=generator)).exp()
    low, high = 0.0, float(longest) / float(spread.min())

    def lengths(scale: float) -> Tensor:
        return (scale * spread).round().clamp(1, longest).long()

    for _ in range(40):  # the mean rises with the scale
        middle = (low + high) / 2
        is_low = float(lengths(middle).double().mean()) < max(MEAN_SHARE * longest, 1.0)
        low, high = (middle, high) if is_low else (low, middle)
    return lengths(high)


def _generator(config: Config, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(3 * config.seed + number)
