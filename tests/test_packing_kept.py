"""Plans with fewer trained tokens: the same paths, and nothing that no kept token depends on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.packing import Plan, pack, pack_rollouts, pack_segments, pack_tree, pack_tree_passes
from tests.helpers import random_ids, random_rollouts
from tests.helpers_packing import check_paths, ids

tokens_of = st.lists(st.integers(0, 2), max_size=5)


@st.composite
def groups(draw) -> Plan:
    """Prompts with completions, single tokens and empty ones among them."""
    prompts = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1,
                            max_size=3))  # fmt: skip
    completions = [draw(st.lists(tokens_of, max_size=4)) for _ in prompts]
    completions[0].append([1, 2])
    rows = [[ids(row) for row in group] for group in completions]
    return pack([ids(row) for row in prompts], rows, min_token_ratio=draw(st.sampled_from([1, 9])))


@st.composite
def trees(draw) -> Plan:
    """Sequences with common prefixes, whole ones inside others among them."""
    rows = [[1, 2], *draw(st.lists(tokens_of, max_size=6))]
    return pack_tree([ids(row) for row in rows], min_token_ratio=1.0)


@st.composite
def forests(draw) -> Plan:
    """Segments of any depth, empty ones among them."""
    rows, parents = [[1, 2]], [-1]
    for index in range(1, draw(st.integers(2, 9))):
        parents.append(draw(st.integers(-1, index - 1)))
        rows.append(draw(tokens_of))
    return pack_segments([ids(row) for row in rows], parents)


def paths(plan: Plan, kept: torch.Tensor) -> list[list[tuple[list[int], int]]]:
    """For each completion the (tokens before, token) of its kept tokens."""
    sees = plan.segments.visibility()
    found: list[list[tuple[list[int], int]]] = [[] for _ in plan.completion_lengths]
    for t in kept.nonzero()[:, 0].tolist():
        path = plan.input_ids[sees[plan.source_index[t]]].tolist()
        found[int(plan.completion_index[t])].append((path, int(plan.target_ids[t])))
    return found


@settings(max_examples=300, deadline=None)
@given(st.one_of(groups(), trees(), forests()), st.randoms(use_true_random=False))
def test_kept_tokens_see_what_they_saw(plan, randomness):
    kept = torch.tensor([randomness.random() < 0.3 for _ in plan.target_ids])
    if not kept.any():
        with pytest.raises(ValueError, match="skip the pass"):
            plan.keep_tokens(kept)
        return
    thin, trimmed = plan.keep_tokens(kept), plan.keep_tokens(kept, trim=True)
    expected = paths(plan, kept)
    check_paths(thin, expected)
    check_paths(trimmed, expected)
    assert thin.input_ids is plan.input_ids
    needed = trimmed.segments.visibility()[trimmed.source_index].any(0)
    assert needed.all()
    longest = [max((len(path) for path, _ in rows), default=0) for rows in expected]
    assert trimmed.num_unshared_tokens == sum(longest)


def test_a_trimmed_tree_is_one_packed_without_the_others():
    sequences = [ids(row) for row in ([5, 6, 7, 8, 9], [5, 6, 7, 1], [5, 6, 2, 3], [4, 4, 4])]
    masks = [torch.zeros(len(row), dtype=torch.bool) for row in sequences]
    masks[0][2], masks[2][3] = True, True
    trimmed = pack_tree(sequences).keep_tokens(
        torch.cat([mask[1:] for mask in masks]), trim=True
    )  # the first tokens are not trained
    expected = pack_tree(sequences, masks)
    assert trimmed.input_ids.tolist() == expected.input_ids.tolist() == [5, 6, 2]
    assert trimmed.source_index.tolist() == expected.source_index.tolist()
    assert trimmed.token_ratio == expected.token_ratio


def test_repeated_tokens_that_are_dropped_cost_nothing():
    sequences = [torch.cat([torch.tensor([3] * 6), x]) for x in random_ids([4, 4, 4])]
    plans = pack_tree_passes(sequences, max_tokens_per_pass=12)
    repeating = plans[1]
    assert repeating.num_repeated_tokens == 6
    kept = torch.zeros_like(repeating.target_ids, dtype=torch.bool)
    kept[1] = True  # the third token of the prefix
    assert repeating.keep_tokens(kept, trim=True).num_repeated_tokens == 2
    assert repeating.keep_tokens(kept).num_repeated_tokens == 6


def test_a_mask_of_another_shape_is_refused():
    plan = pack([ids([1, 2])], [[ids([3, 4])]])
    with pytest.raises(ValueError, match=r"\(2,\), got \(3,\)"):
        plan.keep_tokens(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        plan.keep_tokens(torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize("budget", [14, 1000])
def test_tokens_without_weight_are_cut_before_packing(budget):
    rollouts = random_rollouts([3, 4], [[2, 5, 1], [4, 3, 6]])
    logps = tuple(-torch.rand(n) for n in rollouts.lengths.tolist())
    rollouts = dataclasses.replace(rollouts, rollout_logps=logps)
    weights = [[0, 0], [0, 2, 0, 0, 0], [3], [0, 4, 5, 0], [0, 0, 0], [6, 0, 0, 0, 0, 7]]
    passes = pack_rollouts(
        rollouts, torch.tensor([True] * 5 + [budget > 100]), torch.arange(6.0),
        [torch.tensor(row, dtype=torch.float64) for row in weights],
        max_tokens_per_pass=budget, device=torch.device("cpu"), dtype=torch.float64,
    )  # fmt: skip
    batches = [item.batch for item in passes]
    expected = [(b, w, t) for b, row in enumerate(weights) for t, w in enumerate(row) if w]
    if budget < 100:
        expected = expected[:-2]
    names = ("completion_index", "token_weights", "target_ids", "rollout_logps")
    found = [torch.cat([getattr(x, name) for x in batches]).tolist() for name in names]
    assert found[0] == [b for b, _, _ in expected]
    assert found[1] == [w for _, w, _ in expected]
    assert found[2] == [int(rollouts.completion_ids[b][t]) for b, _, t in expected]
    assert found[3] == [float(logps[b][t]) for b, _, t in expected]
    # Prompts, and what stands before the last token that has a weight.
    assert sum(len(x.input_ids) for x in batches) == (3 + 1) + (4 + 2) + (5 if budget > 100 else 0)


def test_completions_without_weight_are_no_pass():
    rollouts = random_rollouts([3], [[2, 5]])
    nothing = [torch.zeros(2), torch.zeros(5)]
    assert pack_rollouts(
        rollouts, torch.tensor([True, True]), torch.ones(2), nothing,
        max_tokens_per_pass=100, device=torch.device("cpu"),
    ) == []  # fmt: skip
