"""Sampling: recorded log-probabilities, padding, ends, truncation, private randomness."""

import pytest
import torch

from fastrl.errors import InputError
from fastrl.rollout import Sampling, make_engine
from fastrl.rollout.drawing import draw, pick, truncate
from fastrl.types import Example, Prompts
from tests.helpers import random_ids, tiny_policy


def prompts_of(lengths, seed=0):
    ids = random_ids(lengths, seed=seed, vocab_size=250)
    return Prompts(tuple(ids), tuple(Example(prompt="x") for _ in ids))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@pytest.fixture(scope="module")
def rollouts(policy):
    sampling = Sampling(num_generations=4, max_completion_length=12, temperature=0.7)
    # An end that is likely enough to be drawn: finished and truncated rows both occur.
    policy.eos_token_ids = list(range(0, 300, 12))
    return make_engine("generate", policy).generate(prompts_of([5, 1, 9]), sampling, generator())


def test_logps_are_those_of_the_unpadded_sequence_at_the_sampling_temperature(policy, rollouts):
    for b, (completion, logps, entropies) in enumerate(
        zip(
            rollouts.completion_ids,
            rollouts.rollout_logps,
            rollouts.rollout_entropies,
            strict=True,
        )
    ):
        prompt = rollouts.prompts.token_ids[b // 4]
        with torch.no_grad():
            logits = policy.model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        table = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected = table.gather(1, completion[:, None])[:, 0]
        torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
        expected = -(table.exp() * table).sum(-1)
        torch.testing.assert_close(entropies, expected, rtol=0, atol=2e-5)


def test_completions_end_with_their_first_end_token_or_at_the_limit(policy, rollouts):
    ends = set(policy.eos_token_ids)
    assert 0 < int(rollouts.finished.sum()) < len(rollouts.finished)
    for completion, finished in zip(rollouts.completion_ids, rollouts.finished, strict=True):
        ids = completion.tolist()
        assert not ends & set(ids[:-1])
        assert (ids[-1] in ends) == bool(finished)
        assert finished or len(ids) == 12


def test_same_generator_same_bits_and_the_global_seed_has_no_part(policy):
    engine, sampling = make_engine("generate", policy), Sampling(3, 6)
    state = torch.random.get_rng_state()
    first = engine.generate(prompts_of([4, 2]), sampling, generator(5))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(123)
    second = engine.generate(prompts_of([4, 2]), sampling, generator(5))
    other = engine.generate(prompts_of([4, 2]), sampling, generator(6))
    pairs = zip(first.completion_ids, second.completion_ids, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(first.completion_ids, other.completion_ids, strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_generation_settings_in_the_model_directory_do_not_change_the_distribution():
    policy = tiny_policy()
    engine, sampling = make_engine("generate", policy), Sampling(4, 8)
    plain = engine.generate(prompts_of([6]), sampling, generator())
    policy.model.generation_config.repetition_penalty = 3.0
    policy.model.generation_config.suppress_tokens = list(range(100))
    settings = policy.model.generation_config
    same = engine.generate(prompts_of([6]), sampling, generator())
    assert policy.model.generation_config is settings
    pairs = zip(plain.completion_ids, same.completion_ids, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_temperature_zero_takes_the_most_likely_token(policy):
    rollouts = make_engine("generate", policy).generate(
        prompts_of([5]), Sampling(1, 1, temperature=0.0), generator()
    )
    with torch.no_grad():
        logits = policy.model(input_ids=rollouts.prompts.token_ids[0][None]).logits[0, -1]
    assert rollouts.completion_ids[0].tolist() == [int(logits.argmax())]


def test_sampled_frequencies_follow_the_softmax(policy):
    prompts = prompts_of([3])
    sampling = Sampling(4000, 1, temperature=2.0)
    rollouts = make_engine("generate", policy).generate(prompts, sampling, generator())
    drawn = torch.cat(rollouts.completion_ids)
    counts = torch.bincount(drawn, minlength=len(policy.tokenizer)).double() / 4000
    with torch.no_grad():
        logits = policy.model(input_ids=prompts.token_ids[0][None]).logits[0, -1]
    expected = (logits.double() / 2.0).softmax(-1)
    spread = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts - expected).abs() < 5 * spread + 1e-3).all()


def test_truncation_keeps_exactly_what_it_says():
    probabilities = torch.tensor([[0.5, 0.25, 0.15, 0.1]])
    logps = probabilities.log()

    def kept(**settings):
        return torch.isfinite(truncate(logps, Sampling(1, 1, **settings)))[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(top_p=0.01) == [True, False, False, False]
    assert kept(min_p=0.4) == [True, True, False, False]


def test_recorded_logps_and_entropies_are_untruncated(policy):
    sampling = Sampling(8, 4, top_k=2)
    rollouts = make_engine("generate", policy).generate(prompts_of([5]), sampling, generator())
    with torch.no_grad():
        logits = policy.model(input_ids=rollouts.prompts.token_ids[0][None]).logits[0, -1]
    expected = logits.log_softmax(-1)
    for completion, logps in zip(rollouts.completion_ids, rollouts.rollout_logps, strict=True):
        assert int(completion[0]) in expected.topk(2).indices.tolist()
        torch.testing.assert_close(logps[0], expected[completion[0]], rtol=0, atol=1e-5)
    entropy = -(expected.exp() * expected).sum()
    for entropies in rollouts.rollout_entropies:
        torch.testing.assert_close(entropies[0], entropy, rtol=0, atol=1e-5)


def test_tokens_that_the_model_excludes_leave_the_entropy_finite():
    """A logit of -inf has probability 0, and 0 * log 0 is 0."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0, 5.0]])
    drawn = draw(logits, torch.tensor([0.5], dtype=torch.float64), Sampling(1, 1))
    kept = torch.tensor([0.0, 0.0, 5.0]).double().log_softmax(-1)
    assert drawn.entropies.item() == pytest.approx(-float((kept.exp() * kept).sum()), abs=1e-6)


@pytest.mark.parametrize("num_columns", [1, 7, 511, 512, 513, 1500])
def test_a_number_picks_the_column_where_the_sums_pass_it(num_columns):
    generator = torch.Generator().manual_seed(num_columns)
    weights = torch.rand(64, num_columns, generator=generator).pow(8)
    weights[:, ::3] = 0.0
    weights[:, num_columns // 2] += 0.1
    numbers = torch.rand(64, generator=generator, dtype=torch.float64)
    numbers[:3] = torch.tensor([0.0, 1 - 2.0**-53, 0.5])
    picked = pick(weights, numbers)
    assert (weights.gather(1, picked[:, None]) > 0).all()
    ends = weights.double().cumsum(1)
    expected = torch.searchsorted(ends, (numbers * ends[:, -1])[:, None], right=True)[:, 0]
    assert (picked[3:] == expected[3:]).all()
    nonzero = weights[0].nonzero()[:, 0]
    assert picked[0] == nonzero[0]
    assert picked[1] == weights[1].nonzero()[-1, 0]


def test_rows_are_drawn_alike_alone_and_together():
    logits = torch.randn(40, 60_000, generator=torch.Generator().manual_seed(0)) * 4
    numbers = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = draw(logits.clone(), numbers, Sampling(1, 1))
    for row in (0, 17, 39):
        alone = draw(logits[row : row + 1].clone(), numbers[row : row + 1], Sampling(1, 1))
        assert alone.tokens[0] == together.tokens[row]
        torch.testing.assert_close(alone.logps[0], together.logps[row], rtol=0, atol=1e-5)


def test_training_mode_is_restored(policy):
    policy.model.train()
    make_engine("generate", policy).generate(prompts_of([2]), Sampling(1, 1), generator())
    assert policy.model.training


def test_unknown_engine_is_named(policy):
    with pytest.raises(InputError, match=r"unknown rollout\.engine 'generat'; did you mean"):
        make_engine("generat", policy)
