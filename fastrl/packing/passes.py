"""The passes of an optimizer step: groups cut to a budget and packed with their weights.

Legend: P prompts, G completions of a prompt, B = P*G completions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.packing.groups import MIN_TOKEN_RATIO, count_tokens, pack
from fastrl.packing.plan import Plan
from fastrl.packing.tokens import lengths_of, ranges
from fastrl.types import Batch, Rollouts


@dataclass(frozen=True)
class PackedPass:
    """One forward and backward pass of an optimizer step."""

    plan: Plan
    batch: Batch

    def keep_tokens(self, kept: Tensor, *, trim: bool = False) -> PackedPass:
        """The pass with fewer trained tokens, as `Plan.keep_tokens` has it."""
        plan = self.plan.keep_tokens(kept, trim=trim)
        whole = self.batch

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[kept]

        batch = dataclasses.replace(
            whole,
            input_ids=plan.input_ids,
            position_ids=plan.position_ids,
            segments=plan.segments,
            source_index=plan.source_index,
            target_ids=plan.target_ids,
            completion_index=whole.completion_index[kept],
            advantages=whole.advantages[kept],
            token_weights=whole.token_weights[kept],
            old_logps=some(whole.old_logps),
            ref_logps=some(whole.ref_logps),
            rollout_weights=some(whole.rollout_weights),
            rollout_logps=some(whole.rollout_logps),
        )
        return PackedPass(plan, batch)


def split_into_passes(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], *,
    max_tokens_per_pass: int, head_row_cost: float = 0.0,
) -> list[list[tuple[int, list[int]]]]:  # fmt: skip
    """Cut P groups into passes of at most `max_tokens_per_pass` packed tokens, in order.

    Returns for each pass its (prompt, completions of that prompt) pairs. A group stays whole where
    it fits and is split, its prompt repeated, only where it alone is too large. Empty completions
    are left out. `head_row_cost`: what the row of a trained token at the head takes of the budget,
    in packed tokens; all tokens of a completion are trained.
    """
    passes: list[list[tuple[int, list[int]]]] = []
    room = 0.0
    for prompt, prompt_length in enumerate(prompt_lengths):
        costs = {
            g: length - 1 + head_row_cost * length
            for g, length in enumerate(completion_lengths[prompt])
            if length > 0
        }
        if not costs:
            continue
        if prompt_length + max(costs.values()) > max_tokens_per_pass:
            raise ValueError(
                f"expected a completion with its prompt within max_tokens_per_pass "
                f"{max_tokens_per_pass}, got {prompt_length + max(costs.values()):.0f} tokens; "
                "raise it"
            )
        if prompt_length + sum(costs.values()) > room:
            passes.append([])
            room = max_tokens_per_pass
        members: list[int] = []
        room -= prompt_length
        for g, cost in costs.items():
            if cost > room:
                passes[-1].append((prompt, members))
                passes.append([])
                members, room = [], max_tokens_per_pass - prompt_length
            members.append(g)
            room -= cost
        passes[-1].append((prompt, members))
    return passes


def pack_rollouts(
    rollouts: Rollouts, kept: Tensor, advantages: Tensor, weights: Tensor | Sequence[Tensor], *,
    max_tokens_per_pass: int, device: torch.device, dtype: torch.dtype = torch.float32,
    head_row_cost: float = 0.0, min_token_ratio: float = MIN_TOKEN_RATIO,
) -> list[PackedPass]:  # fmt: skip
    """The kept completions as packed passes with one advantage and one weight per trained token.

    kept: (B,) bool; advantages: (B,); weights: (B,), or for each completion one of every token.
    Rows that are not kept cost nothing. With weights of tokens, those of weight 0 have no row at
    the head, and what follows the last other token of a completion is not encoded. A token that was
    not sampled has the weight 0.

    Where sharing prompts would shorten the whole step by less than `min_token_ratio`, no pass
    shares any: decided once, because a pass that unshared its prompts later would break its budget.
    """
    G = rollouts.num_generations
    prompts = rollouts.prompts.token_ids
    tokens = _tokens_of(rollouts, advantages, weights)
    completions = [
        ids[:end] if keep else _NO_TOKENS
        for ids, end, keep in zip(rollouts.completion_ids, tokens.ends, kept.tolist(), strict=True)
    ]
    prompt_lengths, lengths = lengths_of(prompts), lengths_of(completions)
    shared, unshared = count_tokens(prompt_lengths, lengths, torch.full_like(prompt_lengths, G))
    is_shared = unshared >= min_token_ratio * shared
    size = G if is_shared else 1
    groups = torch.arange(len(completions)).view(-1, size).tolist()
    passes = split_into_passes(
        prompt_lengths.repeat_interleave(G // size).tolist(),
        lengths.view(-1, size).tolist(),
        max_tokens_per_pass=max_tokens_per_pass,
        head_row_cost=head_row_cost,
    )
    packed = []
    last = -1
    for pairs in passes:
        plan = pack(
            [prompts[groups[group][0] // G] for group, _ in pairs],
            [[completions[groups[group][g]] for g in members] for group, members in pairs],
            min_token_ratio=1.0 if is_shared else min_token_ratio,
        )
        first = pairs[0][0]
        if first == last:  # the group was too large for one pass
            repeated = len(prompts[groups[first][0] // G])
            plan = dataclasses.replace(plan, num_repeated_tokens=repeated)
        last = pairs[-1][0]
        rows = torch.tensor([groups[group][g] for group, members in pairs for g in members])
        packed.append(_with_values(plan, rows, tokens, device, dtype))
    return packed


def count_rollouts(rollouts: Rollouts) -> int:
    """Packed tokens of all completions in one pass, with prompts shared where that is worth it."""
    prompts = lengths_of(rollouts.prompts.token_ids)
    sizes = torch.full_like(prompts, rollouts.num_generations)
    shared, unshared = count_tokens(prompts, rollouts.lengths, sizes)
    return shared if unshared >= MIN_TOKEN_RATIO * shared else unshared


def split_cost(passes: Sequence[PackedPass]) -> int:
    """Packed tokens that the step encodes again because a group did not fit into one pass."""
    return sum(item.plan.num_repeated_tokens for item in passes)


class _Tokens(NamedTuple):
    """Every token of every completion, where a pass takes its values from."""

    starts: Tensor  # (B,) int64: the first token of each completion
    ends: list[int]  # B: tokens of each completion up to the last one to train
    advantages: Tensor  # (B,)
    weights: Tensor
    rollout_logps: Tensor | None
    drops_some: bool  # those of weight 0


def _tokens_of(
    rollouts: Rollouts, advantages: Tensor, weights: Tensor | Sequence[Tensor]
) -> _Tokens:
    lengths, sampled = rollouts.lengths, rollouts.rollout_logps
    ends, drops_some = lengths.tolist(), False
    if rollouts.sampled is not None:
        weights = [own * drawn for own, drawn in zip(weights, rollouts.sampled, strict=True)]
    if isinstance(weights, Tensor):
        weights = weights.repeat_interleave(lengths)
    else:
        places = [row.nonzero()[:, 0].tolist() for row in weights]
        ends, drops_some = [max(row, default=-1) + 1 for row in places], True
        weights = torch.cat(list(weights))
    return _Tokens(
        starts=lengths.cumsum(0) - lengths,
        ends=ends,
        advantages=advantages,
        weights=weights,
        rollout_logps=None if sampled is None else torch.cat(sampled),
        drops_some=drops_some,
    )


def _with_values(
    plan: Plan, rows: Tensor, tokens: _Tokens, device: torch.device, dtype: torch.dtype
) -> PackedPass:
    """The pass of a plan whose completions are `rows` of the rollouts."""
    places = ranges(tokens.starts[rows], torch.tensor(plan.completion_lengths))
    if tokens.drops_some:
        kept = tokens.weights[places] != 0
        plan, places = plan.keep_tokens(kept), places[kept]
    owners = rows[plan.completion_index]
    sampled = tokens.rollout_logps
    plan = plan.to(device)
    batch = Batch(
        input_ids=plan.input_ids,
        position_ids=plan.position_ids,
        segments=plan.segments,
        source_index=plan.source_index,
        target_ids=plan.target_ids,
        completion_index=owners.to(device),
        advantages=tokens.advantages[owners].to(device, dtype),
        token_weights=tokens.weights[places].to(device, dtype),
        rollout_logps=None if sampled is None else sampled[places].to(device),
    )
    return PackedPass(plan, batch)


_NO_TOKENS = torch.empty(0, dtype=torch.int64)
