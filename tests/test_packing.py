"""What a plan holds, how passes are cut, and that packing changes neither logits nor gradients."""

import pytest
import torch

from fastrl.errors import InputError
from fastrl.packing import pack, pack_rollouts, split_into_passes
from fastrl_kernels import LMHead, linear_logps
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
    # The source of a completion's first token is its prompt's last token.
    sources = plan.scatter(plan.source_index)
    assert sources[0].tolist() == [4, 5, 6, 7]
    assert sources[1].tolist() == [4]
    assert sources[3].tolist() == [4, 8, 9, 10, 11, 12, 13]
    assert plan.position_ids[sources[3]].tolist() == [4, 5, 6, 7, 8, 9, 10]


def test_source_precedes_target_along_every_path():
    prompts, completions = ragged([4, 2], [[3, 5], [6, 1]])
    plan = pack(prompts, completions)
    rows = [(p, c) for p, group in enumerate(completions) for c in group]
    for (p, completion), sources in zip(rows, plan.scatter(plan.source_index), strict=True):
        path = torch.cat([prompts[p][-1:], completion[:-1]])
        assert torch.equal(plan.input_ids[sources], path)


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


def test_masks_are_freed_with_the_block():
    model = tiny_model("mistral", sliding_window=4)
    plan = pack(*ragged([4], [[3, 2]]))
    with plan.attach(model):
        model.model(**plan.inputs)
        assert plan.segments.visibility(4) is plan.segments.visibility(4)
    mask = plan.segments.visibility(4)
    plan.segments.forget_masks()
    assert plan.segments.visibility(4) is not mask


def test_models_that_would_leak_are_refused():
    plan = pack(*ragged([4], [[3, 2]]))
    hybrid = tiny_model(
        "lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2, block_ff_dim=48
    )
    with pytest.raises(InputError, match="conv"), plan.attach(hybrid):
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


def test_a_group_that_fits_stays_whole():
    passes = split_into_passes([4, 4], [[5, 5], [5, 5]], max_tokens_per_pass=15)
    assert passes == [[(0, [0, 1])], [(1, [0, 1])]]


def test_a_completion_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="max_tokens_per_pass 10, got 14"):
        split_into_passes([4], [[2, 11]], max_tokens_per_pass=10)


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
    ],
)
def test_bad_input(prompts, completions, message):
    def tensors(rows):
        return [torch.tensor(row, dtype=None if row and isinstance(row[0], float) else torch.int64)
                for row in rows]  # fmt: skip

    with pytest.raises(ValueError, match=message):
        pack(tensors(prompts), [tensors(group) for group in completions])


def test_scatter_refuses_values_of_another_plan():
    plan = pack(*ragged([4], [[3, 2]]))
    with pytest.raises(ValueError, match=r"\(5,\), got \(4,\)"):
        plan.scatter(torch.zeros(4))
