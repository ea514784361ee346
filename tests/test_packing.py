"""What a plan holds, how passes are cut, and that packing changes neither logits nor gradients."""

import dataclasses

import pytest
import torch

from fastrl.errors import InputError
from fastrl.packing import pack, pack_rollouts, pack_rows, split_cost, split_into_passes
from fastrl_kernels import LMHead, linear_logps, make_segments
from tests.helpers import random_ids, random_rollouts, tiny_model, with_float64_norms

PROMPTS = [5, 1, 3]
COMPLETIONS = [[4, 1, 0, 7], [2, 2], [0, 0, 0]]  # ragged, empty, a prompt with nothing to train


def ragged(prompt_lengths, completion_lengths, seed=0):
    flat = [n for group in completion_lengths for n in group]
    ids = iter(random_ids(flat, seed=seed + 1))
    return random_ids(prompt_lengths, seed=seed), [
        [next(ids) for _ in g] for g in completion_lengths
    ]


def test_plan_holds_every_prompt_once_and_every_trained_token():
    prompts, completions = ragged(PROMPTS, COMPLETIONS)
    plan = pack(prompts, completions)
    assert len(plan.input_ids) == 5 + (3 + 0 + 6) + 1 + (1 + 1)
    assert plan.num_unshared_tokens == (5 + 3) + (5 + 0) + (5 + 6) + 2 * (1 + 1)
    flat = [c for group in completions for c in group]
    assert torch.equal(plan.target_ids, torch.cat(flat))
    for scattered, completion in zip(plan.scatter(plan.target_ids), flat, strict=True):
        assert torch.equal(scattered, completion)
    assert plan.token_ratio == 28 / 17
    # The source of a completion's first token is its prompt's last token.
    sources = plan.scatter(plan.source_index)
    assert sources[0].tolist() == [4, 5, 6, 7]
    assert sources[1].tolist() == [4]
    assert sources[3].tolist() == [4, 8, 9, 10, 11, 12, 13]
    assert plan.position_ids[sources[3]].tolist() == [4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("min_token_ratio", [1.0, 1e9])
def test_source_precedes_target_along_every_path(min_token_ratio):
    prompts, completions = ragged([4, 2], [[3, 5], [6, 1]])
    plan = pack(prompts, completions, min_token_ratio=min_token_ratio)
    rows = [(p, c) for p, group in enumerate(completions) for c in group]
    for (p, completion), sources in zip(rows, plan.scatter(plan.source_index), strict=True):
        path = torch.cat([prompts[p][-1:], completion[:-1]])
        assert torch.equal(plan.input_ids[sources], path)


def test_rows_are_plain_where_sharing_saves_little():
    prompts, completions = ragged([3, 2], [[40, 0, 1], [30]])
    shared = pack(prompts, completions, min_token_ratio=1.0)
    assert shared.token_ratio == 76 / 73
    assert shared.segments.parents.tolist() == [-1, 0, 0, -1, 3]
    plan = pack(prompts, completions)
    assert plan.segments.parents.tolist() == [-1, -1, -1]
    assert plan.segments.lengths.tolist() == [3 + 39, 3, 2 + 29]
    assert plan.token_ratio == 1.0
    assert plan.completion_lengths == (40, 0, 1, 30)
    rows = [prompts[0], completions[0][0][:-1], prompts[0], prompts[1], completions[1][0][:-1]]
    assert torch.equal(plan.input_ids, torch.cat(rows))
    assert plan.source_index.tolist() == [*range(2, 42), 44, *range(46, 76)]
    assert len(pack(*ragged([2], [[19, 19]])).segments.parents) == 3  # a ratio of 40 / 38
    assert len(pack(*ragged([1], [[20, 20]])).segments.parents) == 2  # a ratio of 40 / 39


def test_a_prompt_per_row_is_packed_like_a_group():
    prompts, completions = ragged([5, 2], [[3, 0, 4], [1, 2, 2]])
    repeated = [prompt.clone() for prompt in prompts for _ in range(3)]
    flat = [completion for group in completions for completion in group]
    plan, expected = pack_rows(repeated, flat, num_generations=3), pack(prompts, completions)
    assert torch.equal(plan.input_ids, expected.input_ids)
    assert torch.equal(plan.source_index, expected.source_index)
    assert plan.completion_lengths == expected.completion_lengths
    repeated[4][1] += 1
    with pytest.raises(ValueError, match="group of rows 3 to 5, got another in row 4"):
        pack_rows(repeated, flat, num_generations=3)
    with pytest.raises(ValueError, match="multiple of num_generations 4, got 6 prompts"):
        pack_rows(repeated, flat, num_generations=4)


def separate_logps(model, prompts, completions):
    """One stock forward per sequence: the definition that packing must reproduce."""
    logps = []
    for prompt, group in zip(prompts, completions, strict=True):
        for completion in group:
            row = torch.cat([prompt, completion])
            logits = model(input_ids=row[None]).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return logps


@pytest.mark.parametrize(
    ("model_type", "fields", "tolerance"),
    [
        ("qwen3", {}, 1e-12),
        ("llama", {}, 1e-12),
        ("mistral", {"sliding_window": 4}, 1e-12),
        # Its norms and its (eager) softmax are float32 inside, whatever the dtype of the model.
        ("gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8}, 2e-6),
    ],
)
def test_packed_equals_one_forward_per_sequence(model_type, fields, tolerance):
    model = with_float64_norms(tiny_model(model_type, **fields))
    if model_type == "gemma2":  # older transformers let SDPA drop the cap on attention scores
        model.set_attn_implementation("eager")
    prompts, completions = ragged([7, 3, 9], [[6, 1, 11], [4, 0, 9], [2, 2, 5]])
    weights = torch.cat([c.double().cos() for group in completions for c in group])

    model.zero_grad()
    expected = torch.cat(separate_logps(model, prompts, completions))
    (weights * expected).sum().backward()
    expected_gradients = {n: p.grad.clone() for n, p in model.named_parameters()}

    model.zero_grad()
    plan = pack(prompts, completions)
    with plan.attach(model):
        hidden = model.model(**plan.inputs).last_hidden_state[0]
    out = linear_logps(hidden[plan.source_index], LMHead.from_model(model), plan.target_ids)
    (weights * out.logps).sum().backward()

    torch.testing.assert_close(out.logps, expected, rtol=0, atol=tolerance)
    for name, parameter in model.named_parameters():
        scale = expected_gradients[name].abs().max()
        torch.testing.assert_close(
            parameter.grad / scale, expected_gradients[name] / scale, rtol=0, atol=tolerance
        )


def test_a_sibling_cannot_be_seen():
    model = tiny_model()
    prompts, completions = ragged([6], [[5, 8, 3]])

    def hidden(group):
        plan = pack(prompts, [group])
        with plan.attach(model), torch.no_grad():
            states = model.model(**plan.inputs).last_hidden_state[0]
        return plan.scatter(states[plan.source_index])

    before = hidden(completions[0])
    changed = [completions[0][0], (completions[0][1] + 5) % 61, completions[0][2]]
    after = hidden(changed)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_attention_is_restored_and_plain_calls_inside_are_refused():
    model = tiny_model()
    plan = pack(*ragged([4], [[3, 2]]))
    with plan.attach(model), pytest.raises(RuntimeError, match="without segments"):
        model(input_ids=plan.input_ids[None])
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=plan.input_ids[None])


def test_models_that_would_leak_are_refused():
    plan = pack(*ragged([4], [[3, 2]]))
    recurrent = tiny_model("mamba", state_size=4)
    with pytest.raises(InputError, match="linear_attention"), plan.attach(recurrent):
        pass
    dropout = tiny_model("qwen3", attention_dropout=0.1).train()
    with pytest.raises(InputError, match="dropout"), plan.attach(dropout):
        pass
    with pytest.raises(InputError, match="transformers model"), plan.attach(torch.nn.Linear(2, 2)):
        pass


def test_passes_respect_the_budget_and_cover_every_token_once():
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        P = int(torch.randint(1, 6, (1,), generator=generator))
        prompts = torch.randint(1, 9, (P,), generator=generator).tolist()
        groups = torch.randint(0, 12, (P, 5), generator=generator).tolist()
        budget = 20 + trial % 30
        passes = split_into_passes(prompts, groups, max_tokens_per_pass=budget)
        seen = []
        for pairs in passes:
            size = sum(prompts[p] + sum(groups[p][g] - 1 for g in members) for p, members in pairs)
            assert 0 < size <= budget
            seen += [(p, g) for p, members in pairs for g in members]
        assert seen == [(p, g) for p in range(P) for g in range(5) if groups[p][g] > 0]
        assert all(members for pairs in passes for _, members in pairs)
        for p, prompt in enumerate(prompts):  # a group that fits stays whole
            size = prompt + sum(max(length - 1, 0) for length in groups[p])
            assert size > budget or sum(p in dict(pairs) for pairs in passes) <= 1


def test_a_completion_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="max_tokens_per_pass 10, got 14"):
        split_into_passes([4], [[2, 11]], max_tokens_per_pass=10)
    with pytest.raises(ValueError, match="max_tokens_per_pass 20, got 25"):
        split_into_passes([4], [[2, 11]], max_tokens_per_pass=20, head_row_cost=1.0)


def test_rows_at_the_head_take_their_part_of_the_budget():
    prompts, groups = [4, 3, 9], [[5, 5], [5, 0, 2], [1, 7]]
    for cost in (0.0, 0.25, 1.0):
        passes = split_into_passes(prompts, groups, max_tokens_per_pass=22, head_row_cost=cost)
        for pairs in passes:
            tokens = sum(prompts[p] + sum(groups[p][g] - 1 for g in own) for p, own in pairs)
            assert tokens + cost * sum(groups[p][g] for p, own in pairs for g in own) <= 22
    assert passes == [[(0, [0, 1])], [(1, [0, 2])], [(2, [0])], [(2, [1])]]


def test_a_split_group_reports_what_it_costs():
    rollouts = random_rollouts([7, 4, 5], [[5, 5, 5, 5], [2, 1, 3, 2], [6, 6, 6, 6]])
    kept, ones = torch.ones(12, dtype=torch.bool), torch.ones(12)

    def passes(budget, **options):
        options |= {"max_tokens_per_pass": budget, "device": torch.device("cpu")}
        return pack_rollouts(rollouts, kept, ones, ones, **options)

    whole, split = passes(1000), passes(16)
    dear = passes(16, head_row_cost=1.0)  # one completion a pass of the first and last group
    assert (split_cost(whole), split_cost(dear)) == (0, 3 * 7 + 3 * 5)
    assert [item.plan.num_repeated_tokens for item in split] == [0, 7, 0, 0, 5]
    total = [sum(len(item.plan.input_ids) for item in chosen) for chosen in (whole, split)]
    assert split_cost(split) == total[1] - total[0] == 12
    plain = passes(16, min_token_ratio=1e9)  # every completion is a group of its own
    assert {(item.plan.token_ratio, item.plan.num_repeated_tokens) for item in plain} == {(1.0, 0)}
    assert max(len(item.plan.input_ids) for item in plain) <= 16
    rows = [item.batch.completion_index.unique_consecutive() for item in plain]
    assert torch.cat(rows).tolist() == list(range(12))


def test_a_pass_keeps_its_budget_where_it_shares_little():
    """The step decides on sharing: the second pass alone would rather be plain, and too long."""
    rollouts = random_rollouts([40, 2], [[3, 3], [30, 30]])
    kept, ones = torch.ones(4, dtype=torch.bool), torch.ones(4)
    passes = pack_rollouts(
        rollouts, kept, ones, ones, max_tokens_per_pass=60, device=torch.device("cpu")
    )
    assert [len(item.plan.input_ids) for item in passes] == [44, 60]
    assert passes[1].plan.token_ratio < 1.05


def test_dropped_rows_cost_nothing_and_rows_keep_their_numbers():
    rollouts = random_rollouts([3, 4], [[2, 5, 1], [4, 3, 6]])
    kept = torch.tensor([True, False, True, False, False, True])
    values = torch.arange(6, dtype=torch.float64)
    passes = pack_rollouts(
        rollouts, kept, values, 10 * values,
        max_tokens_per_pass=100, device=torch.device("cpu"), dtype=torch.float64,
    )  # fmt: skip
    assert len(passes) == 1
    batch = passes[0].batch
    assert batch.completion_index.tolist() == [0, 0, 2] + [5] * 6
    assert torch.equal(batch.advantages, batch.completion_index.double())
    assert torch.equal(batch.token_weights, 10 * batch.completion_index.double())
    assert len(batch.input_ids) == 3 + 1 + 0 + 4 + 5
    nothing = torch.zeros(6, dtype=torch.bool)
    assert pack_rollouts(
        rollouts, nothing, values, values, max_tokens_per_pass=100, device=torch.device("cpu")
    ) == []  # fmt: skip


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[1, 2]], [], "one list of completions per prompt"),
        ([[]], [[[1]]], "at least one token"),
        ([[1.5]], [[[1]]], "int64"),
        ([], [], "at least one trained token"),
        ([[1, 2]], [[[], []]], "at least one trained token"),
    ],
)
def test_bad_input(prompts, completions, message):
    def tensors(rows):
        return [torch.tensor(row, dtype=None if row and isinstance(row[0], float) else torch.int64)
                for row in rows]  # fmt: skip

    with pytest.raises(ValueError, match=message):
        pack(tensors(prompts), [tensors(group) for group in completions])


def test_what_does_not_belong_to_a_plan_is_refused():
    plan = pack(*ragged([4], [[3, 2]]))
    with pytest.raises(ValueError, match=r"\(5,\), got \(4,\)"):
        plan.scatter(torch.zeros(4))
    with pytest.raises(ValueError, match="all 7 packed tokens, got lengths that sum to 6"):
        dataclasses.replace(plan, segments=make_segments([4, 2], [-1, 0]))
    with pytest.raises(ValueError, match="the 5 trained tokens, got lengths that sum to 6"):
        dataclasses.replace(plan, completion_lengths=(3, 3))
