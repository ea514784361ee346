"""Packed sequences and explicit trees: what every trained token sees, and one forward each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastrl
from fastrl.packing import Plan, pack, pack_segments, pack_tree
from fastrl_kernels import LMHead, linear_logps
from tests.helpers import random_ids, tiny_model, with_float64_norms
from tests.helpers_packing import bools, check_paths, ids


@st.composite
def masked_sequences(draw) -> list[tuple[list[int], list[bool]]]:
    sequences = draw(st.lists(st.lists(st.integers(0, 2), max_size=7), min_size=1, max_size=7))
    return [
        (tokens, [index > 0 and draw(st.booleans()) for index in range(len(tokens))])
        for tokens in sequences
    ]


@settings(max_examples=100, deadline=None)
@given(masked_sequences(), st.booleans())
def test_every_trained_token_of_a_sequence_sees_its_prefix(rows, is_shared):
    sequences, masks = [ids(tokens) for tokens, _ in rows], [bools(mask) for _, mask in rows]
    # Everything a trained token depends on: the prefixes that end before a trained token, once.
    needed = [
        {tuple(tokens[: k + 1]) for t in range(len(tokens)) if mask[t] for k in range(t)}
        for tokens, mask in rows
    ]
    if not any(needed):
        with pytest.raises(ValueError, match="at least one trained token"):
            pack_tree(sequences, masks)
        return
    plan = pack_tree(sequences, masks, min_token_ratio=1.0 if is_shared else 1e9)
    unshared = sum(map(len, needed))
    assert plan.num_unshared_tokens == unshared
    assert len(plan.input_ids) == (len(set().union(*needed)) if is_shared else unshared)
    assert plan.token_ratio == unshared / len(plan.input_ids)
    expected = [
        [(tokens[:t], tokens[t]) for t in range(len(tokens)) if mask[t]] for tokens, mask in rows
    ]
    check_paths(plan, expected)


@st.composite
def masked_forests(draw) -> list[tuple[list[int], int, list[bool]]]:
    """(tokens, parent, mask) of segments in any order that puts parents first."""
    segments: list[tuple[list[int], int, list[bool]]] = []
    depths: list[int] = []
    for index in range(draw(st.integers(1, 9))):
        parent = draw(st.integers(-1, index - 1))
        tokens = draw(st.lists(st.integers(0, 60), max_size=4))
        depth = depths[parent] + len(segments[parent][0]) if parent >= 0 else 0
        mask = [depth + t > 0 and draw(st.booleans()) for t in range(len(tokens))]
        segments.append((tokens, parent, mask))
        depths.append(depth)
    return segments


@settings(max_examples=100, deadline=None)
@given(masked_forests())
def test_every_trained_token_of_a_segment_sees_its_path(segments):
    tokens = [ids(segment[0]) for segment in segments]
    parents = [segment[1] for segment in segments]
    masks = [bools(segment[2]) for segment in segments]

    def path(segment: int) -> list[tuple[int, int]]:
        """The tokens up to the end of a segment, each as (segment, offset)."""
        above = path(parents[segment]) if parents[segment] >= 0 else []
        return above + [(segment, offset) for offset in range(len(tokens[segment]))]

    expected, needed = [], set()
    for segment in range(len(segments)):
        expected.append([])
        for offset in masks[segment].nonzero()[:, 0].tolist():
            before = path(segment)[: path(segment).index((segment, offset))]
            needed |= set(before)
            values = [int(tokens[s][o]) for s, o in before]
            expected[-1].append((values, int(tokens[segment][offset])))
    if not needed:
        with pytest.raises(ValueError, match="at least one trained token"):
            pack_segments(tokens, parents, masks)
        return
    plan = pack_segments(tokens, parents, masks)
    assert len(plan.input_ids) == len(needed)
    check_paths(plan, expected)


def test_trained_on_everything_but_the_first_token_by_default():
    sequences = [ids([4, 5, 6]), ids([]), ids([4, 5, 7, 8]), ids([9])]
    plan = pack_tree(sequences)
    assert [row.tolist() for row in plan.scatter(plan.target_ids)] == [[5, 6], [], [5, 7, 8], []]
    assert plan.input_ids.tolist() == [4, 5, 7]  # the last tokens are only predicted
    assert plan.source_index.tolist() == [0, 1, 0, 1, 2]
    # Roots without tokens: the first token of a path may lie further down.
    plan = pack_segments([ids([]), ids([4, 5]), ids([6]), ids([])], [-1, 0, 1, 0])
    assert [row.tolist() for row in plan.scatter(plan.target_ids)] == [[], [5], [6], []]
    assert plan.input_ids.tolist() == [4, 5]
    # Below an empty segment: predicted by the trunk, not by the branch that lies before it.
    plan = pack_segments([ids([4, 5]), ids([6, 7]), ids([]), ids([8])], [-1, 0, 0, 2])
    assert plan.input_ids.tolist() == [4, 5, 6]
    assert plan.source_index.tolist() == [0, 1, 2, 1]


def test_a_token_that_sequences_share_and_train_is_there_for_each():
    """One hidden state, two rows at the head: each sequence keeps its own advantage and ratio."""
    sequences = [ids([1, 2, 3, 4]), ids([1, 2, 3, 5]), ids([1, 2, 3, 4])]
    plan = pack_tree(sequences)
    assert plan.input_ids.tolist() == [1, 2, 3]
    assert plan.source_index.tolist() == [0, 1, 2] * 3
    assert plan.completion_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert plan.token_ratio == 3.0


def test_row_lies_in_the_order_of_the_sequences():
    """Equal to packing groups, when completions part at their first token."""
    prompts = random_ids([5, 3])
    completions = [
        [torch.cat([ids([first]), rest]) for first, rest in zip(firsts, tails, strict=True)]
        for firsts, tails in (
            ([9, 4, 7], random_ids([3, 5, 1], seed=1)),
            ([8, 2], random_ids([2, 6], seed=2)),
        )
    ]
    expected = pack(prompts, completions)
    rows = [(prompt, c) for prompt, group in zip(prompts, completions, strict=True) for c in group]
    plan = pack_tree(
        [torch.cat(row) for row in rows],
        [torch.arange(len(p) + len(c)) >= len(p) for p, c in rows],
    )
    assert plan.completion_lengths == expected.completion_lengths
    assert plan.num_unshared_tokens == expected.num_unshared_tokens
    for name in ("input_ids", "position_ids", "source_index", "target_ids", "completion_index"):
        assert torch.equal(getattr(plan, name), getattr(expected, name)), name
    assert torch.equal(plan.segments.ends, expected.segments.ends)


def test_sharing_that_saves_little_is_left_alone():
    """Every row begins alike, as with a token for the beginning of a text: rows stay plain."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 10**6, (length,), generator=generator) for length in (29, 41, 33)]
    for sequence in sequences:
        sequence[0] = 1
    plan = pack_tree(sequences)
    assert plan.segments.parents.tolist() == [-1, -1, -1]
    assert plan.token_ratio == 1.0
    always = pack_tree(sequences, min_token_ratio=1.0)
    assert always.segments.parents.tolist() == [-1, 0, 0, 0]
    assert len(plan.input_ids) - len(always.input_ids) == 2


def separate_logps(model, paths: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """One stock forward per (tokens, mask): the definition that packing must reproduce."""
    logps = []
    for tokens, mask in paths:
        logits = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        logps.append(logits.gather(1, tokens[1:, None])[:, 0][mask[1:]])
    return logps


def check_model(plan: Plan, paths: list[tuple[Tensor, Tensor]]) -> None:
    """Log-probabilities and gradients of a packed row against one forward per sequence."""
    model = with_float64_norms(tiny_model())
    expected = torch.cat(separate_logps(model, paths))
    weights = torch.arange(len(expected)).double().cos()
    (weights * expected).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with plan.attach(model):
        hidden = model.model(**plan.inputs).last_hidden_state[0]
    out = linear_logps(hidden[plan.source_index], LMHead.from_model(model), plan.target_ids)
    (weights * out.logps).sum().backward()
    torch.testing.assert_close(out.logps, expected, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max()
        torch.testing.assert_close(
            parameter.grad / scale, gradients[name] / scale, rtol=0, atol=1e-12, msg=name
        )


@pytest.mark.parametrize("seed", range(3))
def test_random_prefixes_equal_one_forward_per_sequence(seed):
    """Each sequence continues a random prefix of an earlier one; weights differ by sequence."""
    generator = torch.Generator().manual_seed(seed)
    paths: list[tuple[Tensor, Tensor]] = []
    for tail in random_ids([13, 7, 1, 11, 5, 3], seed=seed):
        tokens = tail
        if paths:
            parent = paths[int(torch.randint(len(paths), (), generator=generator))][0]
            cut = int(torch.randint(len(parent) + 1, (), generator=generator))
            tokens = torch.cat([parent[:cut], tail])
        mask = torch.rand(len(tokens), generator=generator) < 0.6
        mask[0] = False
        paths.append((tokens, mask))
    plan = pack_tree([tokens for tokens, _ in paths], [mask for _, mask in paths])
    assert plan.token_ratio > 1.05
    check_model(plan, paths)


def test_a_dialogue_whose_thoughts_are_stripped_equals_one_forward_per_turn():
    """Thoughts are side leaves; an answer is read again, untrained, on the trunk of later turns."""
    question, thought, answer, reply, second, last, unused = random_ids([6, 5, 3, 4, 7, 2, 5])
    turns = [torch.cat([thought, answer]), torch.cat([second, last])]
    token_ids = [question, turns[0], torch.cat([answer, reply]), unused, turns[1], thought[:2]]
    parents = [-1, 0, 0, 2, 2, 0]
    trained = [
        torch.full((len(tokens),), index in (1, 4)) for index, tokens in enumerate(token_ids)
    ]
    plan = pack_segments(token_ids, parents, trained)
    assert len(plan.input_ids) == 6 + (8 - 1) + (3 + 4) + (9 - 1)  # no unused, no sixth segment
    assert plan.num_unshared_tokens == (6 + 7) + (6 + 7 + 8)
    rows = [[question, turns[0]], [question, answer, reply, turns[1]]]
    paths = [
        (torch.cat(row), torch.arange(sum(map(len, row))) >= sum(map(len, row[:-1])))
        for row in rows
    ]
    check_model(plan, paths)
    tree = pack_tree([tokens for tokens, _ in paths], [mask for _, mask in paths])
    assert len(tree.input_ids) == len(plan.input_ids)
    check_model(tree, paths)


def test_public_name():
    assert fastrl.pack_tree is pack_tree


FLAT = [ids([1, 2]), ids([3])]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pack_tree([]), "at least one trained token"),
        (lambda: pack_tree([ids([1])]), "at least one trained token"),
        (lambda: pack_segments([], []), "at least one trained token"),
        (lambda: pack_tree([torch.tensor([1.0])]), "int64 token vectors"),
        (lambda: pack_tree([ids([1, 2]).to("meta")]), "on the CPU, got meta"),
        (lambda: pack_tree(FLAT, [bools([False, True])]), "1 masks for 2 vectors"),
        (lambda: pack_tree(FLAT, [bools([True]), bools([True])]), r"\(2,\) bool as mask 0"),
        (lambda: pack_tree(FLAT, [ids([0, 1]), ids([0])]), r"got \(2,\) of torch.int64"),
        (lambda: pack_tree(FLAT, [bools([False, True]), bools([True])]), "one in sequence 1"),
        (lambda: pack_segments(FLAT, [-1], None), "1 parents for 2 segments"),
        (lambda: pack_segments(FLAT, [-1, 2]), "a segment below 2 as the parent of segment 1"),
        (lambda: pack_segments(FLAT, [-1, -2]), "got -2"),
        (lambda: pack_segments(FLAT, [1, -1]), "parents before their children, got segment 1"),
        (lambda: pack_segments(FLAT, [1, 0]), "cycle: segment 0"),
        (lambda: pack_segments(FLAT, [-1, 1]), "cycle: segment 1"),
        (lambda: pack_segments(FLAT, [-1, 0], [bools([True]), bools([True])]), "as mask 0"),
        (lambda: pack_segments([ids([]), FLAT[1]], [-1, 0], [bools([]), bools([True])]),
         "one in segment 1"),
    ],
)  # fmt: skip
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
