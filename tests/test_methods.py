"""The records: published numbers, what they ask for, what is refused, and finite losses."""

from __future__ import annotations

import inspect
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.config import ObjectiveConfig
from fastrl.errors import InputError
from fastrl.methods import (
    AXES,
    FAMILIES,
    METHODS,
    Method,
    Penalty,
    check_method,
    register,
    resolve_method,
    use,
)
from fastrl.methods.axes import hyper_parameters_of
from fastrl.methods.coefficients import token_objective
from fastrl.methods.defaults import DEFAULTS
from fastrl.methods.inputs import KNOWN
from fastrl.methods.needs import requirements
from fastrl.methods.rules import correct_tokens
from fastrl_kernels.objectives import SURROGATES, Objective, clipped_ratio, evaluate
from tests.helpers_methods import loss_of, small_method, step_inputs
from tests.published_methods import CLASS_A, NEEDS_MORE, NUMBERS

TRAINABLE = [name for name, method in METHODS.items() if not method.missing]
BEYOND_THE_LOSS = {  # of CLASS_A: what a step cannot have yet, word by word in its record
    "kto": "completions under other prompts",
    "superhf": "over the whole vocabulary",
    "sft_chi2": "demonstrations", "sft_hellinger": "demonstrations", "sft_js": "demonstrations",
    "irl_sft": "demonstrations",
    "aspo_tool": "the place of the first tool call",
    "gui_g1": "a weight of every prompt",
    "slic": "a third completion", "rationale_dpo": "a third completion",
    "rationale_orpo": "a third completion",
}  # fmt: skip


def numbers(method: Method) -> dict[str, object]:
    """Every hyper-parameter of a method's choices as axis.name."""
    return {
        f"{axis}.{key}": value
        for axis, choice in method.choices.items()
        for key, value in {
            **hyper_parameters_of(axis, choice.name), **choice.parameters,
        }.items()
    }  # fmt: skip


def test_every_published_method_is_there_once():
    assert not [name for name in (CLASS_A + NEEDS_MORE).split() if name not in METHODS]
    assert len(METHODS) == sum(map(len, FAMILIES.values()))
    assert len(FAMILIES) == 9
    lacking = {name for name in CLASS_A.split() if METHODS[name].missing}
    assert lacking == set(BEYOND_THE_LOSS)
    for name, words in BEYOND_THE_LOSS.items():
        assert words in METHODS[name].missing


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_the_published_ones(name):
    method, known = METHODS[name], numbers(METHODS[name])
    for key, value in NUMBERS[name].items():
        if key in AXES:
            assert method.choices[key].name == value
        elif key == "beta":
            assert [(p.regulariser.name, p.beta) for p in method.penalties] == value
        elif key == "entropy_coef":
            assert method.entropy_coef == value
        else:
            full = [other for other in known if other == key or other.endswith(f".{key}")]
            assert len(full) == 1, f"{key} of {name}: {full}"
            assert known[full[0]] == value, full[0]


@pytest.mark.parametrize("name", METHODS)
def test_records_name_what_exists_and_what_they_lack(name):
    method = METHODS[name]
    assert method.source
    assert method.formula
    assert "\n" not in method.formula
    for axis, choice in method.choices.items():
        assert choice.name in AXES[axis]
        assert set(choice.parameters) <= set(hyper_parameters_of(axis, choice.name))
    for penalty in method.penalties:
        assert penalty.regulariser.name in AXES["regulariser"]
        assert penalty.tokens is None or penalty.tokens.name in AXES["tokens"]
    if method.missing:
        with pytest.raises(InputError, match="which is not built yet"):
            resolve_method(name, ObjectiveConfig())
    else:
        check_method(method)
        assert requirements(method) <= KNOWN
        assert resolve_method(name, ObjectiveConfig()) == method


def test_defaults_are_for_functions_that_exist():
    from_elsewhere = {("bounded_ratio", "low"), ("bounded_ratio", "high"), ("tapered", "reward"),
                      ("negative_aware", "pass_rate")}  # fmt: skip
    for axis in ("surrogate", "regulariser"):
        for name in AXES[axis]:
            for key, value in hyper_parameters_of(axis, name).items():
                assert (value is inspect.Parameter.empty) == ((name, key) in from_elsewhere)
    known = {name: set(hyper_parameters_of("surrogate", name)) for name in SURROGATES}
    assert all(set(values) <= known[name] for name, values in DEFAULTS.items())


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("gsop", {}, "unknown method 'gsop'; did you mean 'gspo'?"),
        ("grpo", {"advantage": "group_relativ"}, "did you mean 'group_relative'?"),
        ("grpo", {"selection": "nonzero"}, "did you mean 'nonzero_std'?"),
        ("grpo", {"loss": "dop"}, "did you mean 'dpo'?"),
        ("grpo", {"regulariser": "k4", "beta": 0.1}, "unknown objective.regulariser 'k4'"),
        ("scalerl", {"parameters": {"phrase": 1.0}}, "phrase must be a text, got 1"),
        ("scalerl", {"parameters": {"decay": "fast"}}, "decay: "),
        ("seed_grpo", {}, "also needs answers that are grouped by meaning"),
        ("rto", {}, "also needs a model trained with DPO"),
        ("grpo", {"advantage": "generalized_advantages"}, "needs values, which takes a critic"),
        ("grpo", {"regulariser": "k2"}, "no effect with beta 0"),
        ("rloo", {"epsilon_low": 0.1}, "no effect on surrogate 'policy_gradient'"),
        ("dpo", {"epsilon_low": 0.1}, "no effect on loss dpo"),
        ("dpo", {"advantage": "group_centred"}, "no effect beside a loss of pairs"),
        ("grpo", {"loss": "dpo", "surrogate": "clipped_ratio"}, "no effect beside a loss"),
        ("gvpo", {"pairing": "all_pairs"}, "pairing has no effect on loss group_variance"),
        ("grpo", {"pairing": "all_pairs"}, "pairing has no effect on surrogate"),
        ("dpo", {"pairing": "all_pair"}, "did you mean 'all_pairs'?"),
        ("gspo", {"advantage": "whitened_returns"}, "takes one advantage for a completion"),
        ("grpo", {"surrogate": "negative_aware"}, "needs pass_rate"),
        ("grpo", {"parameters": {"gamma": 1.0}}, "'gamma' belongs to no choice"),
        ("hapo_hetero", {"parameters": {"quantile": 0.5}}, "belongs to several choices"),
        ("grpo", {"parameters": {"loss.beta": 1.0}}, "belongs to no choice"),
    ],
)
def test_what_contradicts_itself_is_refused(name, overrides, message):
    with pytest.raises(InputError) as error:
        resolve_method(name, ObjectiveConfig(**overrides))
    assert message in str(error.value)


def test_every_axis_can_be_replaced():
    overrides = ObjectiveConfig(
        advantage="group_centred", surrogate="soft_gated_ratio", aggregation="prompt_mean",
        token_weights="high_entropy", rollout_correction="masked_tokens", beta=0.1,
        regulariser="k3_plus", selection="nonzero_std", reward_shaping="clipped",
        parameters={"fraction": 0.5, "rollout_correction.highest": 3.0}, entropy_coef=0.2,
    )  # fmt: skip
    method = resolve_method("grpo", overrides)
    assert {axis: str(choice) for axis, choice in method.choices.items()} == {
        "reward_shaping": "clipped", "advantage": "group_centred", "selection": "nonzero_std",
        "token_weights": "high_entropy(fraction=0.5)", "surrogate": "soft_gated_ratio",
        "rollout_correction": "masked_tokens(highest=3)", "aggregation": "prompt_mean",
    }  # fmt: skip
    assert method.penalties == (Penalty(use("k3_plus"), 0.1),)
    assert method.entropy_coef == 0.2


def test_registered_methods_are_checked_and_names_are_taken_once():
    record = Method("mine", "ours", "-rho A", surrogate=use("importance_ratio"))
    try:
        register(record)
        assert resolve_method("mine", ObjectiveConfig()) is record
        with pytest.raises(InputError, match="there is a method 'mine' already"):
            register(record)
    finally:
        METHODS.pop("mine", None)
    with pytest.raises(InputError, match="did you mean 'clipped_ratio'"):
        register(Method("other", "ours", "-rho A", surrogate=use("clippd_ratio")))
    assert "other" not in METHODS


@st.composite
def steps(draw, *, pairs_only: bool):
    sizes = [2] if pairs_only else draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    lengths[0] = max(lengths[0], 1)
    return step_inputs(
        sizes * (2 if pairs_only else 1), lengths, seed=draw(st.integers(0, 99)),
        log_ratio=draw(st.sampled_from([0.0, 0.3, 25.0, 1e3])),
        equal_rewards=draw(st.booleans()), infinite=draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("name", TRAINABLE)
def test_losses_and_slopes_are_finite_whatever_the_step(name):
    method = small_method(name)

    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(steps(pairs_only=name == "p3o"))
    def check(inputs):
        rewards, logps = inputs.rewards.clone(), inputs.logps.clone()
        after, found, losses = loss_of(method, inputs)
        every = [found.token_weights, found.advantages, losses.values, losses.slopes]
        every += [x for x in (found.rollout_weights, found.loss) if x is not None]
        every += [x for x in (found.entropy_coef,) if isinstance(x, torch.Tensor)]
        for values in every:
            assert values.isfinite().all()
        assert found.token_weights.shape == logps.shape
        if method.loss is None:
            assert (found.token_weights[after.lengths[after.tokens] == 0] == 0).all()
        assert torch.equal(inputs.rewards, rewards)
        assert torch.equal(inputs.logps, logps)

    check()


def only_compares(method: Method) -> bool:
    """Whether nothing but the rewards of a group moves the policy."""
    holds_back = {"log_likelihood", "mirror_descent", "kl_penalised_ratio"}
    plain = method.loss is None and method.reward_shaping is None and not method.penalties
    plain = plain and method.value_loss is None
    return plain and method.surrogate.name not in holds_back


@pytest.mark.parametrize("name", [name for name in TRAINABLE if only_compares(METHODS[name])])
def test_equal_rewards_move_nothing(name):
    inputs = step_inputs([4, 4], [3, 1, 2], equal_rewards=True)
    _, found, losses = loss_of(small_method(name), inputs)
    assert (found.token_weights * losses.slopes).abs().max() < 1e-12


def test_a_penalty_on_correct_completions_is_a_mean_over_their_tokens():
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    index = torch.tensor([0, 0, 1, 1, 1, 2])
    expected = torch.tensor([2.0, 2, 0, 0, 0, 2], dtype=torch.float64)
    assert torch.equal(correct_tokens(rewards, index), expected)
    assert torch.equal(correct_tokens(rewards * 0, index), expected * 0)
    assert correct_tokens(rewards, index[:0]).shape == (0,)


def test_grpo_is_its_formula():
    inputs = step_inputs([3, 2], [2, 0, 4, 1], log_ratio=0.5)
    _, found, losses = loss_of(METHODS["grpo"], inputs)
    total, start, counted = 0.0, 0, int((inputs.lengths > 0).sum())
    for completion, length in enumerate(inputs.lengths.tolist()):
        group = [
            float(r) for r, g in zip(inputs.rewards, inputs.groups, strict=True)
            if g == inputs.groups[completion]
        ]  # fmt: skip
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        advantage = (float(inputs.rewards[completion]) - mean) / (std + 1e-4) if std > 1e-8 else 0
        for token in range(start, start + length):
            ratio = math.exp(float(inputs.logps[token] - inputs.old_logps[token]))
            clipped = min(max(ratio, 0.8), 1.2)
            total -= min(ratio * advantage, clipped * advantage) / (length * counted)
        start += length
    assert float((found.token_weights * losses.values).sum()) == pytest.approx(total, abs=1e-12)


def test_nft_on_policy_is_the_centred_reward():
    """1 - k for the correct, -k for the wrong: the paper's relation to Dr. GRPO."""
    inputs = step_inputs([8], [2], log_ratio=0.0)
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
    inputs = inputs.__class__(**{**vars(inputs), "rewards": rewards})
    _, found, losses = loss_of(METHODS["nft"], inputs)
    slopes = -found.token_weights * losses.slopes * 1000
    expected = (rewards - 0.25)[inputs.tokens]
    torch.testing.assert_close(slopes, expected, rtol=1e-12, atol=1e-12)


def test_a_token_local_objective_costs_no_more_than_twice_a_clip():
    """Of 65536 tokens; the best of many runs, in turns, so that a busy machine delays both."""
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(65536, generator=generator)
    old_logps = logps + 0.3 * torch.randn(65536, generator=generator)
    ref_logps = logps + 0.3 * torch.randn(65536, generator=generator)
    advantages = torch.randn(65536, generator=generator)
    objectives = {"": Objective(clipped_ratio, (0.2, 0.2))}
    for name in TRAINABLE:
        method = METHODS[name]
        if method.loss is None and method.computed is None and method.surrogate.name in SURROGATES:
            objectives[name] = token_objective(method)
    assert len(objectives) > 25
    best, slow, rounds = dict.fromkeys(objectives, math.inf), set(objectives), 0
    while rounds < 9 or (slow and rounds < 90):
        rounds += 1
        for name in objectives if rounds < 9 else ["", *slow]:
            start = time.perf_counter()
            evaluate(objectives[name], logps, old_logps, ref_logps, advantages)
            best[name] = min(best[name], time.perf_counter() - start)
        slow = {name for name, seconds in best.items() if seconds > 2 * best[""]}
    assert not slow, {name: best[name] / best[""] for name in slow}
