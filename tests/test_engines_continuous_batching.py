"""Continuous batching of transformers: what it records, whose weights it uses, what it leaves."""

import pytest
import torch

from fastrl.errors import InputError, NotFiniteError
from fastrl.rollout import Sampling
from fastrl.rollout.continuous_batching import ContinuousBatchingEngine
from tests.helpers import tiny_policy
from tests.helpers_engines import all_logps, generator, prompts_of, same_completions, worst_gap

BOTH = ["sliding_attention", "full_attention"]


@pytest.fixture
def policy():
    policy = tiny_policy()
    policy.eos_token_ids = list(range(0, 300, 12))  # ends are drawn, and not always
    return policy


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("lengths", [[5, 2, 40], [1], [1, 7]])  # of one token: nothing to fork
def test_logps_are_those_of_a_plain_forward(policy, temperature, lengths):
    sampling = Sampling(4, 12, temperature=temperature)
    rollouts = ContinuousBatchingEngine(policy).generate(prompts_of(lengths), sampling, generator())
    assert worst_gap(policy, rollouts, sampling) < 1e-5
    assert rollouts.rollout_entropies is None
    for ids, finished in zip(rollouts.completion_ids, rollouts.finished, strict=True):
        assert bool(finished) == (int(ids[-1]) in policy.eos_token_ids)
        assert finished or len(ids) == 12
        assert not set(ids[:-1].tolist()) & set(policy.eos_token_ids)
    if temperature == 0.0:
        for b, (ids, logps) in enumerate(
            zip(rollouts.completion_ids, rollouts.processed_logps, strict=True)
        ):
            best = all_logps(policy, rollouts, sampling, b).argmax(-1)
            assert torch.equal(ids, best)
            assert torch.equal(logps, torch.zeros(len(ids)))
    else:
        assert rollouts.processed_logps is None


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8, "layer_types": BOTH}),
        ("gpt_oss", {"sliding_window": 8}),
    ],
)  # fmt: skip
def test_logps_of_other_families(model_type, fields):
    policy, sampling = tiny_policy(model_type=model_type, **fields), Sampling(4, 20)
    policy.model.eval()
    prompts = prompts_of([5, 40, 12])
    rollouts = ContinuousBatchingEngine(policy).generate(prompts, sampling, generator())
    assert worst_gap(policy, rollouts, sampling) < 1e-5


def test_an_adapter_is_part_of_the_policy(policy):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    policy.model = peft.get_peft_model(policy.model, config)
    sampling = Sampling(4, 12)
    rollouts = ContinuousBatchingEngine(policy).generate(prompts_of([5, 9]), sampling, generator())
    assert worst_gap(policy, rollouts, sampling) < 1e-5
    with policy.model.disable_adapter():
        assert worst_gap(policy, rollouts, sampling) > 1e-2


@pytest.mark.parametrize("lengths", [[6], [1]])
def test_a_group_has_different_completions_that_follow_the_softmax(policy, lengths):
    sampling = Sampling(1500, 2, temperature=2.0)
    engine = ContinuousBatchingEngine(policy, cache_tokens=10**5, page_size=4)
    rollouts = engine.generate(prompts_of(lengths), sampling, generator())
    drawn = torch.stack([ids[0] for ids in rollouts.completion_ids])
    counts = torch.bincount(drawn, minlength=len(policy.tokenizer)).double() / 1500
    expected = all_logps(policy, rollouts, sampling, 0)[0].exp()
    spread = (expected * (1 - expected) / 1500).sqrt()
    assert ((counts - expected).abs() < 5 * spread + 1e-3).all()
    assert len({tuple(ids.tolist()) for ids in rollouts.completion_ids}) > 1000


def test_weights_changed_in_place_are_sampled_from_at_once(policy):
    """The prompts are the same, so that a cache kept from before would be used again."""
    engine, sampling, prompts = ContinuousBatchingEngine(policy), Sampling(3, 10), prompts_of([64])
    engine.generate(prompts, sampling, generator())
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(1)))
    rollouts = engine.generate(prompts, sampling, generator())
    assert worst_gap(policy, rollouts, sampling) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_and_the_global_stream_are_left_as_they_were(attention, dtype):
    policy = tiny_policy(dtype=dtype)
    policy.model.set_attn_implementation(attention)
    policy.model.train()
    policy.model.model.layers[1].eval()
    settings, before = policy.model.generation_config, policy.model.generation_config.to_dict()
    modes = [module.training for module in policy.model.modules()]
    parameters = [(p, p.dtype, p.clone()) for p in policy.model.parameters()]
    state = torch.random.get_rng_state()
    ContinuousBatchingEngine(policy).generate(prompts_of([5]), Sampling(2, 4), generator())
    assert torch.equal(state, torch.random.get_rng_state())
    assert [module.training for module in policy.model.modules()] == modes
    assert policy.model.config._attn_implementation == attention
    assert policy.model.generation_config is settings
    assert settings.to_dict() == before
    for (old, old_dtype, values), new in zip(parameters, policy.model.parameters(), strict=True):
        assert new is old
        assert new.dtype == old_dtype
        assert torch.equal(values, new)
        assert new.requires_grad


def test_same_generator_same_completions(policy):
    engine, sampling, prompts = ContinuousBatchingEngine(policy), Sampling(5, 8), prompts_of([4, 9])
    first = engine.generate(prompts, sampling, generator(5))
    torch.manual_seed(123)
    assert same_completions(first, engine.generate(prompts, sampling, generator(5)))
    assert not same_completions(first, engine.generate(prompts, sampling, generator(6)))


def test_the_models_own_generation_settings_have_no_part(policy):
    engine, sampling, prompts = ContinuousBatchingEngine(policy), Sampling(4, 8), prompts_of([6])
    first = engine.generate(prompts, sampling, generator())
    policy.model.generation_config.temperature = 0.1
    policy.model.generation_config.top_k = 2
    policy.model.generation_config.max_new_tokens = 3
    assert same_completions(first, engine.generate(prompts, sampling, generator()))


@pytest.mark.parametrize("truncation", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}])
def test_truncated_logps_are_called_processed(policy, truncation):
    sampling = Sampling(6, 6, temperature=0.8, **truncation)
    prompts = prompts_of([5])
    rollouts = ContinuousBatchingEngine(policy).generate(prompts, sampling, generator())
    assert rollouts.rollout_logps is None
    for b, (ids, logps) in enumerate(
        zip(rollouts.completion_ids, rollouts.processed_logps, strict=True)
    ):
        probabilities = all_logps(policy, rollouts, sampling, b).exp()
        for position, token in enumerate(ids.tolist()):
            row = probabilities[position]
            ordered = row.sort(descending=True).values
            if sampling.top_k:
                floor = ordered[sampling.top_k - 1]
            elif sampling.top_p < 1:
                floor = ordered[int((ordered.cumsum(0) < sampling.top_p).sum())]
            else:
                floor = ordered[0] * sampling.min_p
            kept = row[row >= floor]
            assert row[token] >= floor
            expected = row[token].log() - kept.sum().log()
            assert float(logps[position]) == pytest.approx(float(expected), abs=1e-5)


def test_a_cache_too_small_for_the_rollout_changes_nothing_but_the_order(policy):
    """Completions wait, or are taken out of the cache and prefilled again later."""
    policy.eos_token_ids = [0]
    sampling, prompts = Sampling(6, 40), prompts_of([9, 30, 17])
    engine = ContinuousBatchingEngine(policy, cache_tokens=128, page_size=4, max_batch_tokens=16)
    rollouts = engine.generate(prompts, sampling, generator())
    assert worst_gap(policy, rollouts, sampling) < 1e-5
    assert {len(ids) for ids in rollouts.completion_ids} >= {40}


def test_stop_strings_end_a_completion(policy):
    policy.eos_token_ids = [0]
    engine, prompts, strings = ContinuousBatchingEngine(policy), prompts_of([5, 6]), ("1", "i", "W")
    whole = engine.generate(prompts, Sampling(8, 20), generator())
    stopping = Sampling(8, 20, stop_strings=strings)
    rollouts = engine.generate(prompts, stopping, generator())
    num_stopped = 0
    for b, ids in enumerate(whole.completion_ids):
        texts = [policy.tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
        ended = [any(string in text for string in strings) for text in texts]
        length = ended.index(True) + 1 if any(ended) else len(ids)
        assert rollouts.completion_ids[b].tolist() == ids[:length].tolist()
        assert bool(rollouts.finished[b]) == (any(ended) or int(ids[-1]) == 0)
        num_stopped += length < len(ids)
    assert num_stopped > 2
    assert worst_gap(policy, rollouts, stopping) < 1e-5


def test_every_completion_is_handed_out_once_and_as_it_is(policy):
    seen = {}

    def note(b, ids):
        seen.setdefault(b, []).append(ids)

    engine = ContinuousBatchingEngine(policy)
    rollouts = engine.generate(prompts_of([4, 9]), Sampling(5, 8), generator(), note)
    assert sorted(seen) == list(range(10))
    for b, ids in enumerate(rollouts.completion_ids):
        assert len(seen[b]) == 1
        assert torch.equal(seen[b][0], ids)


def test_an_error_in_a_callback_ends_the_engines_thread_and_leaves_the_model(policy):
    def fails(b, ids):
        raise KeyError("mine")

    policy.model.train()
    engine = ContinuousBatchingEngine(policy)
    with pytest.raises(KeyError, match="mine"):
        engine.generate(prompts_of([4, 9]), Sampling(5, 60), generator(), on_completion=fails)
    assert policy.model.training
    rollouts = engine.generate(prompts_of([4]), Sampling(2, 6), generator())
    assert worst_gap(policy, rollouts, Sampling(2, 6)) < 1e-5


def test_what_it_cannot_do_is_said(policy):
    engine = ContinuousBatchingEngine(policy)
    with pytest.raises(InputError, match="no repetition penalty"):
        engine.generate(prompts_of([4]), Sampling(1, 4, repetition_penalty=1.2), generator())
    small = ContinuousBatchingEngine(policy, cache_tokens=64, page_size=8)
    with pytest.raises(InputError, match="cache_tokens of at least 176, got 64"):
        small.generate(prompts_of([60]), Sampling(1, 64), generator())
    with pytest.raises(InputError, match=r"page_size must be at least 4, got 2"):
        ContinuousBatchingEngine(policy, page_size=2)


def test_logits_that_are_not_finite_are_said(policy):
    with torch.no_grad():
        policy.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        ContinuousBatchingEngine(policy).generate(prompts_of([4]), Sampling(2, 4), generator())


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}),
        ("gemma2", {}),  # its soft cap would be left out without a word
    ],
)
def test_a_model_it_does_not_take_is_said(model_type, fields):
    policy = tiny_policy(model_type=model_type, **fields)
    attention = policy.model.config._attn_implementation
    with pytest.raises(InputError, match="does not take this model"):
        ContinuousBatchingEngine(policy).generate(prompts_of([4]), Sampling(2, 4), generator())
    assert policy.model.config._attn_implementation == attention
    assert policy.model.training
