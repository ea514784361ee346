"""Trees over several passes: the budget, what is repeated, and the gradient of one row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrl.packing import pack_tree, pack_tree_passes
from fastrl_kernels import LMHead, linear_logps
from tests.helpers import random_ids, tiny_model, with_float64_norms
from tests.helpers_packing import bools, ids


def prefixes(tokens: list[int], mask: list[bool]) -> set[tuple[int, ...]]:
    """The nodes of the token trie that the trained tokens of a sequence are predicted from."""
    last = max((t for t, is_trained in enumerate(mask) if is_trained), default=0)
    return {tuple(tokens[: end + 1]) for end in range(last)}


@st.composite
def masked_sequences(draw) -> list[tuple[list[int], list[bool]]]:
    sequences = draw(st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=12))
    return [(tokens, [t > 0 and draw(st.booleans()) for t in range(len(tokens))])
            for tokens in sequences]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(masked_sequences(), st.integers(2, 20), st.sampled_from([0.0, 0.25, 1.0]), st.booleans())
def test_passes_keep_their_budget_and_cover_every_trained_token_once(rows, budget, cost, is_shared):
    sequences, masks = [ids(tokens) for tokens, _ in rows], [bools(mask) for _, mask in rows]
    options = {
        "max_tokens_per_pass": budget,
        "head_row_cost": cost,
        "min_token_ratio": 1.0 if is_shared else 1e9,
    }
    if not any(any(mask) for _, mask in rows):
        with pytest.raises(ValueError, match="at least one trained token"):
            pack_tree_passes(sequences, masks, **options)
        return
    longest = max(len(prefixes(*row)) + cost * sum(row[1]) for row in rows)
    if longest > budget:
        with pytest.raises(ValueError, match=f"max_tokens_per_pass {budget}, got"):
            pack_tree_passes(sequences, masks, **options)
        return
    plans = pack_tree_passes(sequences, masks, **options)
    whole = pack_tree(sequences, masks, min_token_ratio=options["min_token_ratio"])
    seen: set[tuple[int, ...]] = set()
    found: list[list[int]] = [[] for _ in rows]
    for plan in plans:
        assert len(plan.input_ids) + cost * len(plan.target_ids) <= budget
        members = sorted(set(plan.completion_index.tolist()))
        own = [prefixes(*rows[b]) for b in members]
        tokens = set().union(*own)
        assert len(plan.input_ids) == (len(tokens) if is_shared else sum(map(len, own)))
        assert plan.num_repeated_tokens == (len(tokens & seen) if is_shared else 0)
        seen |= tokens
        for b, targets in enumerate(plan.scatter(plan.target_ids)):
            assert not (found[b] and len(targets))  # a sequence is in one pass
            found[b] += targets.tolist()
    assert found == [targets.tolist() for targets in whole.scatter(whole.target_ids)]
    packed, repeated = (sum(x) for x in zip(*((len(p.input_ids), p.num_repeated_tokens)
                                              for p in plans), strict=True))  # fmt: skip
    assert packed - repeated == len(whole.input_ids)
    assert sum(plan.num_unshared_tokens for plan in plans) == whole.num_unshared_tokens


def test_subtrees_stay_whole_where_they_fit():
    """Two questions of 4 tokens with two thoughts of 3 each, which continue in answers of 2."""

    def tree(root: int) -> list[list[int]]:
        question = [root, 1, 2, 3]
        return [[*question, thought, 8, 9, answer, 7, 0]
                for thought in (4, 5) for answer in (4, 5, 6)]  # fmt: skip

    sequences = [ids(tokens) for root in (10, 20) for tokens in tree(root)]
    whole, halves, trees = (
        pack_tree_passes(sequences, max_tokens_per_pass=budget) for budget in (44, 22, 13)
    )
    assert [len(plan.input_ids) for plan in whole] == [2 * (4 + 2 * (3 + 3 * 2))]
    assert [len(plan.input_ids) for plan in halves] == [22, 22]
    assert [plan.num_repeated_tokens for plan in halves] == [0, 0]
    # Each thought with its answers; the second of a question repeats the question.
    assert [len(plan.input_ids) for plan in trees] == [13] * 4
    assert [plan.num_repeated_tokens for plan in trees] == [0, 4, 0, 4]
    assert [set(plan.completion_index.tolist()) for plan in trees] == [
        {0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 10, 11}
    ]  # fmt: skip
    small = pack_tree_passes(sequences, max_tokens_per_pass=11)
    assert [len(plan.input_ids) for plan in small] == [11, 9] * 4
    assert sum(plan.num_repeated_tokens for plan in small) == 80 - 44


def test_a_sequence_within_another_costs_nothing_in_its_pass():
    sequences = [ids([1, 2, 3, 4]), ids([1, 2, 3]), ids([1, 2, 3, 4, 5, 6])]
    plans = pack_tree_passes(sequences, max_tokens_per_pass=5)
    assert [plan.completion_lengths for plan in plans] == [(3, 2, 5)]
    # With rows at the head: 2 + 2 tokens, 3 + 3 and 5 + 5.
    plans = pack_tree_passes(sequences, max_tokens_per_pass=10, head_row_cost=1.0)
    assert [plan.completion_lengths for plan in plans] == [(3, 2, 0), (0, 0, 5)]
    assert [plan.num_repeated_tokens for plan in plans] == [0, 3]


def test_a_tree_that_has_to_be_split_begins_a_pass():
    """So that it ends up in as few pieces as it can, and its root is repeated as little."""
    small = [ids([9, 9, 9])]
    large = [ids([1, 2, 3, 4, branch, branch, branch, 0]) for branch in range(5, 11)]
    plans = pack_tree_passes(small + large, max_tokens_per_pass=13)
    assert [len(plan.input_ids) for plan in plans] == [2, 4 + 9, 4 + 9]
    assert sum(plan.num_repeated_tokens for plan in plans) == 4


def test_whether_prefixes_are_shared_is_decided_once():
    """The second pass alone would rather be plain, and too long; or shared, and not be asked."""
    first, *tails = random_ids([40, 3, 3, 30, 30, 2])
    sequences = [torch.cat([first, tail]) for tail in tails[:2]]
    sequences += [torch.cat([tails[4], tail]) for tail in tails[2:4]]
    plans = pack_tree_passes(sequences, max_tokens_per_pass=60)
    assert [len(plan.input_ids) for plan in plans] == [40 + 2 + 2, 2 + 29 + 29]
    assert plans[1].token_ratio < 1.05
    plans = pack_tree_passes(sequences, max_tokens_per_pass=100, min_token_ratio=1.6)
    assert [len(plan.input_ids) for plan in plans] == [42 + 42, 31 + 31]


@pytest.mark.parametrize("budget", [25, 31, 60])
def test_gradient_is_that_of_one_row(budget):
    """Three levels of branches, a weight of its own for every token of every sequence."""
    model = with_float64_norms(tiny_model())
    head = random_ids([6, 5, 4, 7, 3, 6, 2, 5])
    question, first, second, *ends = head
    sequences = [torch.cat([question, *middle, end]) for middle in ([], [first], [second])
                 for end in ends]  # fmt: skip
    sequences.append(torch.cat([question, first, ends[0], ends[1]]))
    masks = [torch.arange(len(tokens)) % 3 != 0 for tokens in sequences]
    weights = [torch.arange(len(s)).double().add(b).cos() for b, s in enumerate(sequences)]

    def backward(plans) -> tuple[list[Tensor], dict[str, Tensor]]:
        model.zero_grad()
        logps: list[Tensor] = [torch.empty(0, dtype=torch.float64)] * len(sequences)
        for plan in plans:
            with plan.attach(model):
                hidden = model.model(**plan.inputs).last_hidden_state[0]
            out = linear_logps(hidden[plan.source_index], LMHead.from_model(model), plan.target_ids)
            own = torch.cat([w[m] for w, m, length in zip(
                weights, masks, plan.completion_lengths, strict=True) if length])  # fmt: skip
            (own * out.logps).sum().backward()
            for b, values in enumerate(plan.scatter(out.logps.detach())):
                logps[b] = torch.cat([logps[b], values])
        return logps, {name: p.grad.clone() for name, p in model.named_parameters()}

    expected, gradients = backward([pack_tree(sequences, masks)])
    plans = pack_tree_passes(sequences, masks, max_tokens_per_pass=budget)
    assert len(plans) > 1
    assert sum(plan.num_repeated_tokens for plan in plans) > 0
    found, grads = backward(plans)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(
            grads[name] / scale, gradient / scale, rtol=0, atol=1e-12, msg=name
        )


def test_a_sequence_over_the_budget_is_refused():
    sequences = [ids([1, 2, 3]), ids([1, 2, 4, 5, 6, 7])]
    with pytest.raises(ValueError, match="max_tokens_per_pass 4, got 5 tokens for sequence 1"):
        pack_tree_passes(sequences, max_tokens_per_pass=4)
    with pytest.raises(ValueError, match="max_tokens_per_pass 9, got 10 tokens for sequence 1"):
        pack_tree_passes(sequences, max_tokens_per_pass=9, head_row_cost=1.0)
