"""A phrase that ends the thinking of completions: where it stands, and that nobody learns it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from fastrl.assembly import build_trainer
from fastrl.carried import begun
from fastrl.config import Config, ObjectiveConfig
from fastrl.down_sampling import weights_before_packing
from fastrl.errors import InputError
from fastrl.loss import token_statistics
from fastrl.methods import METHODS, resolve_method
from fastrl.methods.inputs import StepInputs
from fastrl.methods.needs import requirements
from fastrl.methods.record import use
from fastrl.packing import pack_rollouts
from fastrl.phase_clock import PhaseClock
from fastrl.reference import make_reference
from fastrl.replay import Replay
from fastrl.rollout import Sampling, make_engine
from fastrl.rollout.continuous_batching import ContinuousBatchingEngine
from fastrl.rollout.http import HTTPEngine
from fastrl.rollout.randomness import completion_keys
from fastrl.rollout.thinking import check_thinking, drawn_budgets, phrase_ids
from fastrl.rollout.vllm import VLLMEngine
from fastrl.rollout_tensors import from_tensors, to_tensors
from fastrl.run import train
from fastrl.selection import counted_lengths
from fastrl.thinking import TIME_IS_UP, ThinkingLimit, forced_end, thinking_limit
from fastrl.token_weights import high_entropy
from fastrl.types import Prompts, Rollouts
from tests.helpers import tiny_policy
from tests.helpers_engines import generator, prompts_of, same_completions, worst_gap
from tests.helpers_methods import SIZES
from tests.test_dynamic_sampling import assert_same_end, killed_after, steps_of
from tests.test_native import many_ends
from tests.test_scalerl import scalerl_config

LIMIT = ThinkingLimit(3, 9, "Stop. </think>", "</think>")
G, C = 6, 40
HELPERS = Path(__file__).parent / "helpers.py"
LENGTHS = [5, 1, 9, 9]


@pytest.fixture(scope="module")
def policy():
    return many_ends(tiny_policy())


def sampled(policy, engine: str = "native", limit: ThinkingLimit | None = LIMIT, **settings):
    sampling = Sampling(G, C, thinking=limit, **settings)
    return make_engine(engine, policy).generate(prompts_of(LENGTHS), sampling, generator())


def check_phrases(policy, rollouts: Rollouts, limit: ThinkingLimit) -> dict[str, int]:
    """Every completion has the phrase at its budget or has ended its thinking; how many of each."""
    phrase = torch.tensor(phrase_ids(policy.tokenizer, policy.eos_token_ids, limit))
    found = {"forced": 0, "ended": 0, "closed": 0, "goes on": 0}
    for ids, drawn, budget in zip(
        rollouts.completion_ids, rollouts.sampled, rollouts.thinking_budgets.tolist(), strict=True
    ):
        assert limit.min_thinking_tokens <= budget <= limit.max_thinking_tokens
        expected = torch.ones(len(ids), dtype=torch.bool)
        if len(ids) <= budget:
            assert int(ids[-1]) in policy.eos_token_ids
            found["ended"] += 1
        elif limit.end_of_thinking in policy.tokenizer.decode(ids[:budget]):
            found["closed"] += 1
        else:
            end = budget + len(phrase)
            assert torch.equal(ids[budget:end], phrase)
            expected[budget:end] = False
            found["forced"] += 1
            found["goes on"] += len(ids) > end + 1
        assert torch.equal(drawn, expected)
    return found


@pytest.mark.parametrize("engine", ["native", "generate"])
def test_the_phrase_stands_where_the_budget_ends(policy, engine):
    rollouts = sampled(policy, engine)
    found = check_phrases(policy, rollouts, LIMIT)
    assert min(found[key] for key in ("forced", "ended", "goes on")) > 2
    assert len(set(rollouts.thinking_budgets.tolist())) == 7
    # Log-probabilities are the policy's at every token, of those that were put there too.
    assert worst_gap(policy, rollouts, Sampling(G, C)) < 1e-4
    without = sampled(policy, engine, None)
    assert without.sampled is None
    assert without.thinking_budgets is None
    for ids, plain, budget in zip(
        rollouts.completion_ids, without.completion_ids, rollouts.thinking_budgets, strict=True
    ):
        assert torch.equal(ids[:budget], plain[:budget])


def test_both_engines_force_the_same(policy):
    ours, theirs = sampled(policy), sampled(policy, "generate")
    assert same_completions(ours, theirs)
    assert torch.equal(ours.thinking_budgets, theirs.thinking_budgets)


def test_thinking_that_was_ended_goes_on_as_it_likes(policy):
    """The end may be of any length in tokens, and stand anywhere before the budget."""
    limit = ThinkingLimit(20, 24, "is 3", " ")
    sampling = Sampling(32, C, thinking=limit)
    rollouts = make_engine("native", policy).generate(prompts_of(LENGTHS), sampling, generator())
    found = check_phrases(policy, rollouts, limit)
    assert min(found[key] for key in ("forced", "closed")) > 2


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"top_k": 3, "repetition_penalty": 1.3},
        {"stop_strings": ("k>", "Stop")},
    ],
)
def test_whatever_else_draws_the_tokens(policy, settings):
    """Stop strings in the phrase end nothing; a token that is certain has the log-probability 0."""
    rollouts = sampled(policy, **settings)
    assert check_phrases(policy, rollouts, LIMIT)["forced"] > 2
    if rollouts.processed_logps is not None:
        for logps, drawn in zip(rollouts.processed_logps, rollouts.sampled, strict=True):
            assert not logps[~drawn].any()
            assert torch.isfinite(logps).all()


def test_budgets_are_uniform_and_of_the_completion_alone(policy):
    prompts = prompts_of(LENGTHS)
    keys = completion_keys(prompts, 2000, generator())
    budgets = drawn_budgets(keys, LIMIT)
    assert budgets.tolist() == drawn_budgets(keys, LIMIT).tolist()
    counts = torch.bincount(torch.from_numpy(budgets), minlength=10)
    assert counts[:3].sum() == 0
    assert len(counts) == 10
    expected = 8000 / 7
    assert float(((counts[3:] - expected) ** 2 / expected).sum()) < 22.5  # chi2(6), p 0.001
    whole = sampled(policy)
    for p in range(len(LENGTHS)):
        alone = Prompts((prompts.token_ids[p],), (prompts.examples[p],))
        one = make_engine("native", policy).generate(
            alone, Sampling(G, C, thinking=LIMIT), generator()
        )
        rows = slice(p * G, (p + 1) * G)
        assert torch.equal(one.thinking_budgets, whole.thinking_budgets[rows])
        for ours, theirs in zip(one.completion_ids, whole.completion_ids[rows], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("max_tokens", [1, 30, 97])
def test_completions_that_are_cut_keep_their_budget(policy, max_tokens):
    """Each call has other random numbers; some cut completions within the phrase."""
    engine, sampling = make_engine("native", policy), Sampling(G, C, thinking=LIMIT)
    prompts = prompts_of(LENGTHS)
    rollouts = begun(prompts, range(len(prompts)), sampling).rollouts
    assert set(rollouts.thinking_budgets.tolist()) == {-1}
    seed, within, budgets = 0, 0, None
    while bool((~rollouts.finished & (rollouts.lengths < C)).any()):
        rollouts = engine.advance(
            prompts, sampling, generator(seed), started=rollouts, max_tokens=max_tokens
        )
        saved = to_tensors(rollouts)
        rollouts = from_tensors(saved, prompts.examples)
        assert budgets is None or torch.equal(budgets, rollouts.thinking_budgets)
        budgets = rollouts.thinking_budgets
        within += sum(not drawn[-1] for drawn in rollouts.sampled if len(drawn))
        seed += 1
    assert check_phrases(policy, rollouts, LIMIT)["forced"] > 2
    assert within > 0


def test_what_nobody_drew_has_no_row_and_no_gradient(policy):
    rollouts = sampled(policy)
    num = len(rollouts.completion_ids)
    lengths = counted_lengths(rollouts, mask_truncated_completions=False)
    assert lengths.tolist() == [int(drawn.sum()) for drawn in rollouts.sampled]
    assert lengths.sum() < rollouts.lengths.sum()
    weights = torch.rand(num, generator=generator(1), dtype=torch.float64)
    everything = dataclasses.replace(rollouts, sampled=None, thinking_budgets=None)
    gradients = []
    for rows in (rollouts, everything):
        passes = pack_rollouts(
            rows, torch.ones(num, dtype=torch.bool), torch.ones(num), weights,
            max_tokens_per_pass=200, device=policy.device, dtype=torch.float64,
        )  # fmt: skip
        mask = torch.cat(rollouts.sampled)
        starts = rollouts.lengths.cumsum(0) - rollouts.lengths
        total = 0.0
        for item in passes:
            batch = item.batch
            factors = batch.token_weights.clone()
            if rows is everything:  # the reference: every row, and 0 for those that were not drawn
                first = torch.searchsorted(batch.completion_index, batch.completion_index)
                places = torch.arange(len(first)) - first
                factors *= mask[starts[batch.completion_index] + places]
            hidden = policy.hidden_states(item.plan)[batch.source_index]
            logits = hidden @ policy.lm_head.weight.T
            logps = logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
            total = total + (factors.float() * logps).sum()
        policy.model.zero_grad(set_to_none=True)
        total.backward()
        gradients.append([p.grad.clone() for p in policy.model.parameters()])
        num_rows = sum(len(item.plan.target_ids) for item in passes)
        assert num_rows == int(lengths.sum() if rows is rollouts else rollouts.lengths.sum())
    policy.model.zero_grad(set_to_none=True)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_recorded_scores_pick_among_the_drawn_tokens(policy):
    rollouts = sampled(policy)
    num = len(rollouts.completion_ids)
    lengths = rollouts.num_sampled.clone()
    lengths[3] = 0
    inputs = StepInputs(
        rewards=torch.arange(num).double(), groups=torch.arange(num) // G, lengths=lengths,
        finished=rollouts.finished, max_completion_length=C, progress=torch.tensor(0.0),
        advantages=torch.ones(num, dtype=torch.float64),
    )  # fmt: skip
    method = dataclasses.replace(
        METHODS["grpo"], token_weights=METHODS["entropy_top20"].token_weights,
        aggregation=METHODS["bnpo"].aggregation,
    )  # fmt: skip
    weights = weights_before_packing(method, rollouts, inputs)
    rows = [b for b in range(num) if b != 3]
    drawn = [rollouts.sampled[b] for b in rows]
    entropies = torch.cat(
        [rollouts.rollout_entropies[b][own] for b, own in zip(rows, drawn, strict=True)]
    )
    expected = high_entropy(entropies.double()) / int(lengths.sum())
    found = torch.cat([weights[b][own] for b, own in zip(rows, drawn, strict=True)])
    torch.testing.assert_close(found, expected)
    assert not weights[3].any()
    assert not any(weights[b][~own].any() for b, own in zip(rows, drawn, strict=True))


THINKS = {"min_thinking_tokens": 2, "max_thinking_tokens": 5, "phrase": "</think>"}


def run_config(directory: Path, **changes) -> Config:
    config = scalerl_config(directory, objective={"parameters": THINKS}, max_steps=4)
    rollout = dataclasses.replace(config.rollout, max_completion_length=18)
    return dataclasses.replace(config, rollout=rollout, **changes)


def test_a_killed_run_forces_the_same(tmp_path):
    config = run_config(tmp_path / "whole")
    train(config)
    rows = steps_of(tmp_path / "whole")
    assert all(0 < row["completions/forced_end_ratio"] <= 1 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    text = (tmp_path / "whole/completions.jsonl").read_text()
    assert "</think>" in text
    killed_after(2, tmp_path / "whole", tmp_path / "killed")
    train(dataclasses.replace(config, output_dir=str(tmp_path / "killed")), resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_killed_run_with_partial_rollouts_forces_the_same(tmp_path):
    objective = {"parameters": THINKS, "rollout_correction": "truncated_tokens"}
    config = run_config(tmp_path / "whole", max_steps=8)
    rollout = dataclasses.replace(config.rollout, max_tokens_per_step=70)
    config = dataclasses.replace(config, rollout=rollout, objective=objective)
    train(config)
    carried = [row["rollout/carried_prompts"] for row in steps_of(tmp_path / "whole")]
    stop = next(step for step, num in enumerate(carried, start=1) if num and step > 1)
    killed_after(stop, tmp_path / "whole", tmp_path / "killed")
    train(dataclasses.replace(config, output_dir=str(tmp_path / "killed")), resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_step_trains_all_that_was_drawn_and_no_more(tmp_path):
    trainer = build_trainer(run_config(tmp_path / "run"))
    for step in range(9):  # the first that has a group to learn from
        rollouts, _, rewards = trainer.sample(step, PhaseClock()).trained
        packed = trainer.pack(rollouts, trainer.inputs(rollouts, rewards, step))
        kept = packed.inputs.lengths > 0
        if kept.any():
            break
    trained = sum(len(item.plan.target_ids) for part in packed.parts for item in part.passes)
    assert 0 < trained == int(rollouts.num_sampled[kept].sum()) < int(rollouts.lengths[kept].sum())
    # Averages are over the same tokens: each prompt's weights add up to its share.
    weights = torch.cat([x.batch.token_weights for part in packed.parts for x in part.passes])
    owners = torch.cat([x.batch.completion_index for part in packed.parts for x in part.passes])
    of_prompt = torch.zeros(3, dtype=weights.dtype).index_add(0, owners // 4, weights)
    share = 1 / int(kept.view(3, 4).any(1).sum())
    expected = torch.where(kept.view(3, 4).any(1), share, 0.0).to(weights)
    torch.testing.assert_close(of_prompt, expected)
    statistics = [
        token_statistics(trainer.policy, x.plan, 1.0) for p in packed.parts for x in p.passes
    ]
    recorded = torch.cat([x.batch.rollout_logps for p in packed.parts for x in p.passes])
    gap = torch.cat([found.logps for found in statistics]) - recorded
    assert gap.abs().max() < 1e-4


def test_a_recording_is_replayed_with_what_was_forced(tmp_path):
    config = run_config(tmp_path / "run")
    train(config, save_rollouts=tmp_path / "saved")
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    train(again, replay_rollouts=tmp_path / "saved")
    assert_same_end(tmp_path / "run", tmp_path / "again")
    assert Replay(tmp_path / "saved").steps() == [0, 1, 2, 3]


def test_the_default_is_the_published_one():
    limit = thinking_limit(METHODS["scalerl"])
    assert limit == (10240, 12288, TIME_IS_UP, "</think>")
    assert thinking_limit(METHODS["grpo"]) is None
    assert forced_end(max_thinking_tokens=0) is None
    assert METHODS["scalerl"].missing == ""


@pytest.mark.parametrize(
    ("parameters", "length", "message"),
    [
        ({}, 5, r"need rollout.max_completion_length of at least 123\d\d, got 5; raise it, lower"),
        ({**THINKS, "max_thinking_tokens": 9}, 5, "max_thinking_tokens = 0 for no limit"),
        ({**THINKS, "min_thinking_tokens": 6}, 18, "expected 0 <= min_thinking_tokens <= max_thin"),
        ({**THINKS, "phrase": "stop"}, 18, "phrase must hold end_of_thinking, '</think>'"),
        ({**THINKS, "phrase": 2.0}, 18, "phrase must be a text, got 2.0"),
        ({**THINKS, "max_thinking_tokens": "many"}, 18, "max_thinking_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run(tmp_path, parameters, length, message):
    config = scalerl_config(tmp_path / "run", objective={"parameters": parameters})
    rollout = dataclasses.replace(config.rollout, max_completion_length=length)
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(config, rollout=rollout))
    assert not (tmp_path / "run").exists()


def test_the_least_length_is_enough_and_one_less_is_not(policy):
    num_tokens = len(phrase_ids(policy.tokenizer, policy.eos_token_ids, LIMIT))
    check_thinking(policy.tokenizer, policy.eos_token_ids, LIMIT, 9 + num_tokens + 1)
    with pytest.raises(InputError, match=f"at least {9 + num_tokens + 1}, got {9 + num_tokens}"):
        check_thinking(policy.tokenizer, policy.eos_token_ids, LIMIT, 9 + num_tokens)


def test_a_phrase_with_an_end_in_it_is_refused(policy):
    token = policy.tokenizer("Stop", add_special_tokens=False)["input_ids"][0]
    with pytest.raises(InputError, match="has a token that ends completions"):
        phrase_ids(policy.tokenizer, [token], LIMIT)


@pytest.mark.parametrize(
    ("name", "engine"),
    [("hf_cb", ContinuousBatchingEngine), ("vllm", VLLMEngine), ("http", HTTPEngine)],
)
def test_engines_that_draw_every_token_say_so(name, engine):
    asked = engine.__new__(engine)
    sampling = Sampling(G, C, thinking=LIMIT)
    with pytest.raises(InputError, match=f"rollout.engine '{name}' cannot put the phrase"):
        asked.generate(prompts_of(LENGTHS), sampling, generator())


def test_a_run_with_such_an_engine_is_refused_before_it_begins(tmp_path):
    config = run_config(tmp_path / "run")
    rollout = dataclasses.replace(config.rollout, engine="hf_cb")
    with pytest.raises(InputError, match="'hf_cb' cannot put the phrase"):
        train(dataclasses.replace(config, rollout=rollout))
    assert not (tmp_path / "run").exists()


def test_parameters_of_the_method_are_overridden_by_name():
    method = resolve_method("scalerl", ObjectiveConfig(parameters=THINKS))
    assert thinking_limit(method) == (2, 5, "</think>", "</think>")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gspo", {}),
        ("entropy_top20", {}),
        ("d3s", {}),
        ("dpo", {}),
        ("ppo", {"reward_shaping": None}),
        ("vapo", {}),
        ("spo_single_stream", {}),
    ],
)
def test_methods_of_every_kind_learn_from_what_was_drawn(tmp_path, monkeypatch, name, changes):
    """Of sequences, of recorded and of measured scores, of pairs, with value models and rates."""
    method = dataclasses.replace(
        METHODS[name], name="ended", thinking=use("forced_end", **THINKS), **changes
    )
    monkeypatch.setitem(METHODS, "ended", method)
    config = run_config(tmp_path / "run", method="ended", num_iterations=2)
    config = dataclasses.replace(
        config, rewards=(f"{HELPERS}:checksum",), objective={"parameters": SIZES.get(name, {})},
        num_mini_batches=2,
    )  # fmt: skip
    trainer = build_trainer(config)
    if "ref_logps" in requirements(trainer.method):
        trainer.reference = make_reference(trainer.policy, "copy", moves=False)
    seen = []
    update = trainer.updater.update

    def watched(packed, step, **options):
        seen.extend(item.batch for part in packed.parts for item in part.passes)
        return update(packed, step, **options)

    trainer.updater.update = watched
    output = trainer.train_step(0)
    rollouts = output.sampled.trained.rollouts
    assert output.metrics["completions/forced_end_ratio"] > 0
    assert output.metrics["grad_norm"] > 0
    assert all(math.isfinite(value) for value in output.metrics.values())
    trained: dict[int, list[int]] = {}
    for batch in seen:
        owners, targets = batch.completion_index.tolist(), batch.target_ids.tolist()
        for row, token in zip(owners, targets, strict=True):
            trained.setdefault(row, []).append(token)
    assert trained
    for row, tokens in trained.items():
        drawn = rollouts.completion_ids[row][rollouts.sampled[row]].tolist()
        assert tokens == drawn or name in ("entropy_top20", "d3s")
        assert len(tokens) <= len(drawn)


def test_one_completion_a_prompt_has_no_spread_to_be_zero(tmp_path):
    config = run_config(tmp_path / "run", method="spo_single_stream", objective={})
    rollout = dataclasses.replace(config.rollout, num_generations=1)
    metrics = build_trainer(dataclasses.replace(config, rollout=rollout)).train_step(0).metrics
    assert "frac_reward_zero_std" not in metrics
    assert metrics["reward_std"] == 0
    metrics = build_trainer(config).train_step(0).metrics
    assert 0 <= metrics["frac_reward_zero_std"] <= 1
