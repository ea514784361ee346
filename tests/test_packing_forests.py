"""Any group and any forest, small and large, against one sequence after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.packing import pack, pack_segments, pack_tree
from tests.helpers_packing import bools, check_paths, ids

lengths = st.integers(0, 4)
"""Empty ones and single tokens among them."""


@st.composite
def groups(draw) -> list[tuple[list[int], list[list[int]]]]:
    """1 to 4 prompts with 0 to 5 completions each, one of a kind among them."""
    token = st.integers(0, 60)
    return [
        (
            draw(st.lists(token, min_size=1, max_size=5)),
            [draw(st.lists(token, min_size=n, max_size=n))
             for n in draw(st.lists(lengths, max_size=5))],
        )
        for _ in range(draw(st.integers(1, 4)))
    ]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(groups(), st.booleans())
def test_every_token_of_a_completion_sees_its_prompt_and_what_precedes_it(rows, is_shared):
    prompts = [ids(prompt) for prompt, _ in rows]
    completions = [[ids(tokens) for tokens in group] for _, group in rows]
    if not any(len(tokens) for _, group in rows for tokens in group):
        with pytest.raises(ValueError, match="at least one trained token"):
            pack(prompts, completions)
        return
    plan = pack(prompts, completions, min_token_ratio=1.0 if is_shared else 1e9)
    check_paths(plan, [
        [(prompt + tokens[:t], token) for t, token in enumerate(tokens)]
        for prompt, group in rows for tokens in group
    ])  # fmt: skip
    inputs = [(len(prompt), len(tokens) - 1) for prompt, group in rows
              for tokens in group if tokens]  # fmt: skip
    unshared = sum(map(sum, inputs))
    shared = sum(own for _, own in inputs) + sum(len(p) for p, group in rows if any(group))
    assert plan.num_unshared_tokens == unshared
    assert len(plan.input_ids) == (shared if is_shared else unshared)


def random_forest(seed: int) -> tuple[list[list[int]], list[int], list[list[bool]]]:
    """Tokens, parents and masks of 300 segments in at most 5 levels, parents somewhere before."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, size: int) -> list[int]:
        return torch.randint(0, high, (size,), generator=generator).tolist()

    tokens: list[list[int]] = []
    parents: list[int] = []
    levels: list[int] = []
    before: list[int] = []  # tokens on the path before the segment
    masks: list[list[bool]] = []
    for segment in range(300):
        (parent,) = integers(segment + 1, 1)
        parent = -1 if parent == segment or levels[parent] == 4 else parent
        parents.append(parent)
        levels.append(0 if parent < 0 else levels[parent] + 1)
        before.append(0 if parent < 0 else before[parent] + len(tokens[parent]))
        tokens.append(integers(3, integers(5, 1)[0]))
        drawn = integers(2, len(tokens[-1]))
        masks.append([before[-1] + t > 0 and drawn[t] == 1 for t in range(len(drawn))])
    assert max(levels) == 4
    return tokens, parents, masks


@pytest.mark.parametrize("seed", range(4))
def test_forests_of_hundreds_of_segments(seed):
    tokens, parents, masks = random_forest(seed)

    def path(segment: int) -> list[int]:
        return path(parents[segment]) + tokens[segment] if segment >= 0 else []

    expected = []
    for segment, own in enumerate(tokens):
        above = path(parents[segment])
        expected.append([(above + own[:t], own[t]) for t in range(len(own)) if masks[segment][t]])
    plan = pack_segments(list(map(ids, tokens)), parents, list(map(bools, masks)))
    check_paths(plan, expected)
    assert plan.segments.num_segments > 200


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_shared", [True, False])
def test_hundreds_of_sequences_with_shared_prefixes(seed, is_shared):
    """One sequence for every path of the forest, in its order, trained where the path is."""
    tokens, parents, masks = random_forest(seed)
    sequences: list[list[int]] = []
    trained: list[list[bool]] = []
    for segment, parent in enumerate(parents):
        sequences.append((sequences[parent] if parent >= 0 else []) + tokens[segment])
        trained.append((trained[parent] if parent >= 0 else []) + masks[segment])
    plan = pack_tree(
        list(map(ids, sequences)), list(map(bools, trained)),
        min_token_ratio=1.0 if is_shared else 1e9,
    )  # fmt: skip
    check_paths(plan, [
        [(sequence[:t], sequence[t]) for t in range(len(sequence)) if mask[t]]
        for sequence, mask in zip(sequences, trained, strict=True)
    ])  # fmt: skip
    rows = plan.distinct_rows()
    pairs = zip(plan.source_index.tolist(), plan.target_ids.tolist(), strict=True)
    assert len(set(pairs)) == len(rows.counts)
    assert torch.equal(rows.source_index[rows.index], plan.source_index)
    assert torch.equal(rows.target_ids[rows.index], plan.target_ids)
