"""Completions as one packed row in which a group's prompt stands once.

Legend: P prompts, G completions of a prompt (ragged in `pack`), B = P*G rows, N packed tokens,
S trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.packing.plan import Plan
from fastrl.packing.tokens import check_not_empty, check_token_ids, lengths_of, ranges
from fastrl_kernels.segments import Segments, make_segments

MIN_TOKEN_RATIO = 1.05
"""Below it the work around shared prompts would cost more than the tokens they save."""


def pack(
    prompt_ids: Sequence[Tensor], completion_ids: Sequence[Sequence[Tensor]], *,
    min_token_ratio: float = MIN_TOKEN_RATIO,
) -> Plan:  # fmt: skip
    """Pack P prompts and their completions into one row that holds every prompt once.

    prompt_ids: P int64 vectors, none empty; completion_ids: for each prompt a list of int64 vectors
    of any length, zero included. The last token of a completion predicts nothing and is not
    encoded; a prompt without trained tokens is not encoded either. The last prompt token predicts
    the first token of all its completions.

    Where sharing would shorten the row by less than `min_token_ratio`, nothing is shared: each
    completion then is one plain row with a copy of its prompt. 1 shares always.
    """
    _check_groups(prompt_ids, completion_ids)
    completions = [completion for group in completion_ids for completion in group]
    prompts, lengths = lengths_of(prompt_ids), lengths_of(completions)
    check_not_empty(int(lengths.sum()))
    sizes = torch.tensor([len(group) for group in completion_ids])
    shared, unshared = count_tokens(prompts, lengths, sizes)
    is_shared = unshared >= min_token_ratio * shared
    groups = [
        (prompt, [completion for completion in group if completion.numel()])
        for prompt, group in zip(prompt_ids, completion_ids, strict=True)
    ]
    if not is_shared:
        groups = [(prompt, [completion]) for prompt, group in groups for completion in group]
    input_ids, segments, source_index = _lay_out([g for g in groups if g[1]], is_shared=is_shared)
    return Plan(
        input_ids=input_ids,
        segments=segments,
        source_index=source_index,
        target_ids=torch.cat(completions),
        completion_index=torch.repeat_interleave(lengths, output_size=len(source_index)),
        completion_lengths=tuple(lengths.tolist()),
        num_unshared_tokens=unshared,
    )


def pack_rows(
    prompt_ids: Sequence[Tensor], completion_ids: Sequence[Tensor], *, num_generations: int,
    min_token_ratio: float = MIN_TOKEN_RATIO,
) -> Plan:  # fmt: skip
    """`pack` for callers who hold one prompt per row: B prompts and B completions.

    Row p*G + g is completion g of prompt p, and the G prompts of a group must be equal.
    """
    G = num_generations
    if G < 1 or len(prompt_ids) != len(completion_ids) or len(prompt_ids) % G:
        raise ValueError(
            f"expected as many prompts as completions, a multiple of num_generations {G}, got "
            f"{len(prompt_ids)} prompts and {len(completion_ids)} completions"
        )
    for row, prompt in enumerate(prompt_ids):
        if not torch.equal(prompt, prompt_ids[row - row % G]):
            raise ValueError(
                f"expected one prompt in the group of rows {row - row % G} to "
                f"{row - row % G + G - 1}, got another in row {row}; keep the {G} completions of "
                "a prompt adjacent, and strip padding"
            )
    groups = [completion_ids[row : row + G] for row in range(0, len(prompt_ids), G)]
    return pack(prompt_ids[::G], groups, min_token_ratio=min_token_ratio)


def count_tokens(prompts: Tensor, completions: Tensor, sizes: Tensor) -> tuple[int, int]:
    """Packed tokens of P groups with every prompt once, and with one prompt per completion.

    prompts, completions: lengths of all prompts and all completions; sizes: (P,) completions of
    each prompt.
    """
    group = torch.repeat_interleave(sizes, output_size=len(completions))
    num_trained = torch.bincount(group[completions > 0], minlength=len(prompts))
    inputs = int((completions - 1).clamp(min=0).sum())
    return inputs + int(prompts[num_trained > 0].sum()), inputs + int((prompts * num_trained).sum())


def _lay_out(
    groups: Sequence[tuple[Tensor, list[Tensor]]], *, is_shared: bool
) -> tuple[Tensor, Segments, Tensor]:
    """Token ids (N,), segments, and sources (S,) of prompts each followed by its completions.

    Unless `is_shared`, every prompt has one completion and makes one segment with it.
    """
    pieces = [piece for prompt, completions in groups for piece in (prompt, *completions)]
    lengths = lengths_of(pieces)
    sizes = torch.tensor([len(completions) for _, completions in groups])
    prompts = (sizes + 1).cumsum(0) - (sizes + 1)  # among the pieces
    is_completion = torch.ones(len(pieces), dtype=torch.bool)
    is_completion[prompts] = False
    parents = torch.full_like(lengths, -1)
    parents[is_completion] = prompts.repeat_interleave(sizes)

    inputs = lengths - is_completion.long()  # nothing follows the last token of a completion
    starts = inputs.cumsum(0) - inputs
    input_ids = torch.cat(pieces).index_select(0, ranges(lengths.cumsum(0) - lengths, inputs))

    prompt_of, num_trained = parents[is_completion], lengths[is_completion]
    sources = ranges(starts[is_completion] - 1, num_trained)
    # Only the first completion of a prompt lies next to the token that predicts its first one.
    sources[num_trained.cumsum(0) - num_trained] = starts[prompt_of] + inputs[prompt_of] - 1
    if is_shared:
        segments = make_segments(inputs, parents)
    else:
        segments = make_segments(inputs.view(-1, 2).sum(1), [-1] * len(groups))
    return input_ids, segments, sources


def _check_groups(prompt_ids: Sequence[Tensor], completion_ids: Sequence[Sequence[Tensor]]) -> None:
    if len(prompt_ids) != len(completion_ids):
        raise ValueError(
            f"expected one list of completions per prompt, got {len(prompt_ids)} prompts and "
            f"{len(completion_ids)} lists"
        )
    check_token_ids(prompt_ids)
    for group in completion_ids:
        check_token_ids(group)
    for index, prompt in enumerate(prompt_ids):
        if len(prompt) == 0:
            raise ValueError(f"expected a prompt of at least one token, got none at index {index}")
