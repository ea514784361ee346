"""Completions as one packed row in which a group's prompt stands once.

Legend: P prompts, G completions of a prompt (ragged), N packed tokens, S trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.types import Batch, Rollouts
from fastrl_kernels.segments import Segments, make_segments


@dataclass(frozen=True)
class Plan:
    """A packed row and the map from hidden states to the tokens they predict.

    Completions are numbered in the caller's order, prompt by prompt. Trained tokens follow that
    order.
    """

    input_ids: Tensor  # (N,) int64
    segments: Segments
    source_index: Tensor  # (S,) int64: the packed position whose hidden state predicts the token
    target_ids: Tensor  # (S,) int64
    completion_index: Tensor  # (S,) int64
    completion_lengths: tuple[int, ...]
    num_unshared_tokens: int  # tokens of the same completions in one row each

    @property
    def position_ids(self) -> Tensor:
        """(N,) int64, continuing along the path from the prompt into each completion."""
        return self.segments.positions

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the body of a transformers model, inside `attach`."""
        return {
            "input_ids": self.input_ids[None],
            "position_ids": self.position_ids[None],
            "use_cache": False,
            "segments": self.segments,
        }

    def attach(self, model: nn.Module) -> AbstractContextManager[None]:
        """Give the model segment attention for this block; models that would leak are refused."""
        from fastrl.integrations.transformers import segment_attention_enabled

        return segment_attention_enabled(model, self.segments)

    def scatter(self, values: Tensor) -> list[Tensor]:
        """Per-token values (S,) as one tensor per completion, in the caller's order."""
        if values.shape[:1] != self.target_ids.shape:
            raise ValueError(
                f"expected one value per trained token, ({len(self.target_ids)},), "
                f"got {tuple(values.shape)}"
            )
        return list(values.split(list(self.completion_lengths)))

    def to(self, device: torch.device) -> Plan:
        """The same plan with its tensors on `device`."""
        return Plan(
            self.input_ids.to(device),
            self.segments.to(device),
            self.source_index.to(device),
            self.target_ids.to(device),
            self.completion_index.to(device),
            self.completion_lengths,
            self.num_unshared_tokens,
        )


def pack(prompt_ids: Sequence[Tensor], completion_ids: Sequence[Sequence[Tensor]]) -> Plan:
    """Pack P prompts and their completions into one row that holds every prompt once.

    prompt_ids: P int64 vectors, none empty; completion_ids: for each prompt a list of int64 vectors
    of any length, zero included. The last token of a completion predicts nothing and is not
    encoded; a prompt without trained tokens is not encoded either. The last prompt token predicts
    the first token of all its completions.
    """
    _check_ids(prompt_ids, completion_ids)
    pieces: list[Tensor] = []
    parents: list[int] = []
    sources: list[Tensor] = []
    num_packed = 0
    num_unshared = 0
    for prompt, completions in zip(prompt_ids, completion_ids, strict=True):
        trained = [completion for completion in completions if len(completion) > 0]
        if not trained:
            continue
        root = len(pieces)
        pieces.append(prompt)
        parents.append(-1)
        num_packed += len(prompt)
        prompt_end = torch.tensor([num_packed - 1])
        for completion in trained:
            inputs = completion[:-1]
            pieces.append(inputs)
            parents.append(root)
            sources += [prompt_end, torch.arange(num_packed, num_packed + len(inputs))]
            num_packed += len(inputs)
            num_unshared += len(prompt) + len(inputs)
    flat = [completion for completions in completion_ids for completion in completions]
    lengths = tuple(len(completion) for completion in flat)
    return Plan(
        input_ids=_concatenate(pieces),
        segments=make_segments([len(piece) for piece in pieces], parents),
        source_index=_concatenate(sources),
        target_ids=_concatenate(flat),
        completion_index=torch.arange(len(flat)).repeat_interleave(torch.tensor(lengths).long()),
        completion_lengths=lengths,
        num_unshared_tokens=num_unshared,
    )


def split_into_passes(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], *,
    max_tokens_per_pass: int,
) -> list[list[tuple[int, list[int]]]]:  # fmt: skip
    """Cut P groups into passes of at most `max_tokens_per_pass` packed tokens, in order.

    Returns for each pass its (prompt, completions of that prompt) pairs. A group stays whole where
    it fits and is split, its prompt repeated, only where it alone is too large. Empty completions
    are left out.
    """
    passes: list[list[tuple[int, list[int]]]] = []
    room = 0
    for prompt, prompt_length in enumerate(prompt_lengths):
        costs = {g: length - 1 for g, length in enumerate(completion_lengths[prompt]) if length > 0}
        if not costs:
            continue
        if prompt_length + max(costs.values()) > max_tokens_per_pass:
            raise ValueError(
                f"expected a completion with its prompt within max_tokens_per_pass "
                f"{max_tokens_per_pass}, got {prompt_length + max(costs.values())} tokens; raise it"
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


@dataclass(frozen=True)
class PackedPass:
    """One forward and backward pass of an optimizer step."""

    plan: Plan
    batch: Batch


def pack_rollouts(
    rollouts: Rollouts, kept: Tensor, advantages: Tensor, completion_weights: Tensor, *,
    max_tokens_per_pass: int, device: torch.device, dtype: torch.dtype = torch.float32,
) -> list[PackedPass]:  # fmt: skip
    """The kept completions as packed passes with one advantage and one weight per trained token.

    kept: (B,) bool; advantages, completion_weights: (B,). Rows that are not kept cost nothing.
    """
    G = rollouts.num_generations
    completions = [
        [rollouts.completion_ids[p * G + g] if kept[p * G + g] else _NO_TOKENS for g in range(G)]
        for p in range(len(rollouts.prompts))
    ]
    prompts = rollouts.prompts.token_ids
    passes = split_into_passes(
        [len(prompt) for prompt in prompts],
        [[len(completion) for completion in group] for group in completions],
        max_tokens_per_pass=max_tokens_per_pass,
    )
    packed = []
    for pairs in passes:
        plan = pack(
            [prompts[p] for p, _ in pairs],
            [[completions[p][g] for g in members] for p, members in pairs],
        )
        rows = torch.tensor([p * G + g for p, members in pairs for g in members])
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
        packed.append(PackedPass(plan, batch))
    return packed


_NO_TOKENS = torch.empty(0, dtype=torch.int64)


def _concatenate(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(pieces)) if pieces else _NO_TOKENS


def _check_ids(prompt_ids: Sequence[Tensor], completion_ids: Sequence[Sequence[Tensor]]) -> None:
    if len(prompt_ids) != len(completion_ids):
        raise ValueError(
            f"expected one list of completions per prompt, got {len(prompt_ids)} prompts and "
            f"{len(completion_ids)} lists"
        )
    for index, ids in enumerate([*prompt_ids, *(c for group in completion_ids for c in group)]):
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise ValueError(f"expected int64 token vectors, got {tuple(ids.shape)} of {ids.dtype}")
        if index < len(prompt_ids) and len(ids) == 0:
            raise ValueError(f"expected a prompt of at least one token, got none at index {index}")
