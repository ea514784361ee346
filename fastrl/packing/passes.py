"""The passes of an optimizer step: groups cut to a budget and packed with their weights.

Legend: P prompts, G completions of a prompt, B = P*G completions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.packing.groups import MIN_TOKEN_RATIO, count_tokens, pack
from fastrl.packing.plan import Plan
from fastrl.packing.tokens import lengths_of
from fastrl.types import Batch, Rollouts


@dataclass(frozen=True)
class PackedPass:
    """One forward and backward pass of an optimizer step."""

    plan: Plan
    batch: Batch


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
    rollouts: Rollouts, kept: Tensor, advantages: Tensor, completion_weights: Tensor, *,
    max_tokens_per_pass: int, device: torch.device, dtype: torch.dtype = torch.float32,
    head_row_cost: float = 0.0, min_token_ratio: float = MIN_TOKEN_RATIO,
) -> list[PackedPass]:  # fmt: skip
    """The kept completions as packed passes with one advantage and one weight per trained token.

    kept: (B,) bool; advantages, completion_weights: (B,). Rows that are not kept cost nothing.
    Where sharing prompts would shorten the whole step by less than `min_token_ratio`, no pass
    shares any: decided once, because a pass that unshared its prompts later would break its budget.
    """
    G = rollouts.num_generations
    prompts = rollouts.prompts.token_ids
    completions = [
        ids if keep else _NO_TOKENS
        for ids, keep in zip(rollouts.completion_ids, kept.tolist(), strict=True)
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
        packed.append(_with_weights(plan, rows, advantages, completion_weights, device, dtype))
    return packed


def split_cost(passes: Sequence[PackedPass]) -> int:
    """Packed tokens that the step encodes again because a group did not fit into one pass."""
    return sum(item.plan.num_repeated_tokens for item in passes)


def _with_weights(
    plan: Plan, rows: Tensor, advantages: Tensor, completion_weights: Tensor, device: torch.device,
    dtype: torch.dtype,
) -> PackedPass:  # fmt: skip
    """The pass of a plan whose completions are `rows` of the rollouts."""
    row_of_token = rows[plan.completion_index]
    plan = plan.to(device)
    batch = Batch(
        input_ids=plan.input_ids,
        position_ids=plan.position_ids,
        segments=plan.segments,
        source_index=plan.source_index,
        target_ids=plan.target_ids,
        completion_index=row_of_token.to(device),
        advantages=advantages[row_of_token].to(device, dtype),
        token_weights=completion_weights[row_of_token].to(device, dtype),
    )
    return PackedPass(plan, batch)


_NO_TOKENS = torch.empty(0, dtype=torch.int64)
