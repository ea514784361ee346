"""Which completions stay, what their advantages are and how they are averaged, against physics:
a batch in which the others were never sampled, or in which copies are really there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastrl.config import ObjectiveConfig
from fastrl.errors import InputError
from fastrl.methods import METHODS, Method, resolve_method, use
from fastrl.methods.axes import AXES
from fastrl.methods.checks import check_sizes
from fastrl.methods.coefficients import completion_weights, token_weights
from fastrl.methods.estimates import kept_prompts, rows_to_train
from fastrl.methods.inputs import StepInputs, apply
from fastrl.token_weights import TOKEN_WEIGHTS
from tests.helpers_methods import loss_of, small_method, step_inputs


def before_tokens(rewards: list[list[float]], lengths: list[int] | None = None) -> StepInputs:
    """A step of groups of rewards, before any token is looked at."""
    flat = [reward for group in rewards for reward in group]
    sizes = torch.tensor([len(group) for group in rewards])
    return StepInputs(
        rewards=torch.tensor(flat, dtype=torch.float64),
        groups=torch.arange(len(rewards)).repeat_interleave(sizes),
        lengths=torch.tensor(lengths or [3] * len(flat)),
        finished=torch.ones(len(flat), dtype=torch.bool),
        max_completion_length=5,
        progress=torch.zeros((), dtype=torch.float64),
        generator=torch.Generator().manual_seed(0),
        reward_parts=torch.tensor([flat], dtype=torch.float64),
    )


REWARDS = [[0.1, 0.9, 0.5, 0.4, 0.8, 0.2], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0], [0.3] * 6]


def test_pods_forms_advantages_of_the_kept_completions_alone():
    """Of 6 rewards 4 are kept; their advantages are those of a group of these 4."""
    method = resolve_method("pods", ObjectiveConfig(parameters={"num_kept": 4.0}))
    inputs, advantages, kept = rows_to_train(method, before_tokens(REWARDS))
    chosen = [[0, 1, 4, 5], [0, 1, 2, 5], [0, 1, 2, 3]]
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for row, (group, members) in enumerate(zip(REWARDS, chosen, strict=True)):
        rewards = torch.tensor([group[m] for m in members], dtype=torch.float64)
        if rewards.std() > 0:
            expected[row, members] = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    torch.testing.assert_close(advantages.view(3, 6), expected, rtol=1e-12, atol=1e-12)
    assert (inputs.lengths.view(3, 6) > 0).sum(dim=1).tolist() == [4, 4, 4]
    assert kept.tolist() == (expected != 0).flatten().tolist()


def test_other_selections_keep_the_advantages_of_all():
    config = ObjectiveConfig(selection="max_variance", parameters={"num_kept": 4.0})
    of_all = rows_to_train(METHODS["grpo"], before_tokens(REWARDS))[1]
    inputs, advantages, _ = rows_to_train(resolve_method("grpo", config), before_tokens(REWARDS))
    counted = inputs.lengths > 0
    assert torch.equal(advantages, torch.where(counted, of_all, 0))
    again = resolve_method("pods", ObjectiveConfig(advantage_after_selection=False))
    assert not again.advantage_after_selection


def test_d3s_selects_over_the_batch_before_any_token_is_looked_at():
    """Two rows a group, and of these six a fourth of the batch: the largest and the smallest."""
    method = resolve_method(
        "d3s", ObjectiveConfig(parameters={"num_kept": 2, "kept_fraction": 0.25})
    )
    inputs, advantages, kept = rows_to_train(method, before_tokens(REWARDS))
    of_all = rows_to_train(METHODS["grpo"], before_tokens(REWARDS))[1]
    counted = (inputs.lengths > 0).nonzero().flatten().tolist()
    assert len(counted) == 4  # of 18
    assert kept.nonzero().flatten().tolist() == counted
    assert torch.equal(advantages[counted], of_all[counted])
    in_groups = [0, 1, 6, 11, 12, 13]  # extremes of a group; the first two of equal ones
    spread = torch.tensor([float(of_all[i]) for i in in_groups])
    best = max(
        torch.combinations(torch.arange(6), 4), key=lambda c: float(spread[c].var(correction=0))
    )
    assert counted == [in_groups[i] for i in best]


@pytest.mark.parametrize("aggregation", AXES["aggregation"])
def test_prompts_without_spread_leave_the_denominator(aggregation):
    """ScaleRL's filter: the batch is averaged as if they had not been asked."""
    config = ObjectiveConfig(selection="nonzero_std", aggregation=aggregation)
    method = resolve_method("grpo", config)
    lengths = [2, 5, 1, 3, 2, 4, 4, 1, 2, 5, 3, 3]
    inputs, advantages, kept = rows_to_train(method, before_tokens(REWARDS, [*lengths, *[5] * 6]))
    alone, of_two, _ = rows_to_train(method, before_tokens(REWARDS[:2], lengths))
    assert not kept[12:].any()
    assert torch.equal(advantages[:12], of_two)
    weights = completion_weights(method, inputs)
    assert torch.equal(weights[:12], completion_weights(method, alone))
    assert (weights[12:] == 0).all()


def test_prompts_to_replace_are_those_of_which_nothing_counts():
    method = small_method("dapo")
    assert kept_prompts(method, before_tokens(REWARDS)).tolist() == [True, True, False]
    nothing_counts = before_tokens(REWARDS, [0] * 6 + [3] * 12)
    assert kept_prompts(method, nothing_counts).tolist() == [False, True, False]
    # The penalty near the limit makes rewards differ that were alike.
    lengths = [3] * 12 + [5] + [3] * 5
    assert kept_prompts(method, before_tokens(REWARDS, lengths)).tolist() == [True] * 3
    assert kept_prompts(METHODS["grpo"], before_tokens(REWARDS)).tolist() == [True] * 3


RESAMPLED = ("resampled_by_power", "resampled_extremes", "resampled_favouring_best")


@pytest.mark.parametrize("aggregation", AXES["aggregation"])
@pytest.mark.parametrize("name", RESAMPLED)
def test_copies_weigh_as_if_they_were_there(name, aggregation):
    method = Method("m", "", "", selection=use(name), aggregation=use(aggregation))
    lengths = [2, 5, 1, 3, 0, 4, 4, 1, 2, 5, 3, 3, 1, 2, 5, 1, 4, 2]
    inputs, _, _ = rows_to_train(method, before_tokens(REWARDS, lengths))
    copies = inputs.copies
    assert int(copies.sum()) == 18
    rows = [b for b, number in enumerate(copies.tolist()) for _ in range(number)]
    real = dataclasses.replace(
        inputs, lengths=inputs.lengths[rows], groups=inputs.groups[rows], copies=None
    )
    of_rows = completion_weights(method, real)
    expected = [
        sum(float(w) for row, w in zip(rows, of_rows, strict=True) if row == b) for b in range(18)
    ]
    found = completion_weights(method, inputs)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-16
    )
    assert (found[copies == 0] == 0).all()


PRESETS = ["dr_grpo", "cispo", "dapo", "gspo_token", "sapo_soft", "rloo", "reinforce_pp", "gspo"]


@pytest.mark.parametrize("weights", [name for name in TOKEN_WEIGHTS if name != "probability_power"])
@pytest.mark.parametrize("preset", PRESETS)
def test_token_weights_go_with_other_methods(preset, weights):
    """The loss is that of the method, each token times its factor, over the same denominator."""
    parameters = {"cache": 4.0} if preset == "dapo" else {}
    denominator = "masked"
    config = ObjectiveConfig(token_weights=weights, denominator=denominator, parameters=parameters)
    method = resolve_method(preset, config)
    inputs, found, losses = loss_of(method, step_inputs([4, 3], [3, 0, 2, 5], seed=3))
    plain = dataclasses.replace(method, token_weights=None, denominator=None)
    _, without, plain_losses = loss_of(plain, step_inputs([4, 3], [3, 0, 2, 5], seed=3))
    assert torch.equal(losses.slopes, plain_losses.slopes)
    factors = torch.where(
        without.token_weights != 0, found.token_weights / without.token_weights, 0
    )
    if weights in ("high_entropy", "advantage_entropy", "curvature", "clip_covariance"):
        rounded = factors.round()
        torch.testing.assert_close(factors, rounded, rtol=0, atol=1e-12)
        assert set(rounded.tolist()) <= {0.0, 1.0}
    assert 0 < int((factors != 0).sum()) <= len(factors)
    if weights == "high_entropy":
        counted = without.token_weights != 0
        kept = inputs.entropies[counted & (factors != 0)]
        assert kept.min() >= inputs.entropies[counted & (factors == 0)].max()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "prompt_mean"])
@pytest.mark.parametrize("weights", ["high_entropy", "advantage_entropy"])
def test_dropped_tokens_count_in_the_denominator_or_do_not(weights, aggregation):
    """As published by default: they do for high_entropy, they do not for advantage_entropy."""
    inputs = step_inputs([3, 3], [4, 2, 0, 5], seed=1)
    published = {"high_entropy": "masked", "advantage_entropy": "kept"}[weights]
    found = {}
    for denominator in (None, "kept", "masked"):
        config = ObjectiveConfig(
            token_weights=weights, aggregation=aggregation, denominator=denominator,
            parameters={"fraction": 0.4},
        )  # fmt: skip
        method = resolve_method("grpo", config)
        found[denominator] = token_weights(method, loss_of(method, inputs)[0])
    assert torch.equal(found[None], found[published])
    kept = found["kept"] != 0
    assert torch.equal(kept, found["masked"] != 0)
    assert 0 < int(kept.sum()) < len(kept)
    assert found["kept"].sum() == pytest.approx(1.0)  # a mean over what is kept
    if aggregation == "token_mean":
        assert found["masked"].sum() == pytest.approx(int(kept.sum()) / len(kept))
    assert found["masked"].sum() < 1


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("grpo", {"denominator": "kept"}, "has no token_weights"),
        ("grpo", {"advantage_after_selection": True}, "has no selection"),
        ("dpo", {"selection": "best", "advantage_after_selection": True}, "has no advantage"),
        ("d3s", {"advantage_after_selection": True}, "needs a selection by rewards"),
        ("dler", {"advantage_after_selection": True}, "needs a selection by rewards"),
        ("dpo", {"selection": "resampled_by_power"}, "needs advantages or an average of its own"),
        ("dpo", {"selection": "max_variance_advantages"}, "needs advantages or an average"),
        ("dapo", {"selection": "none"}, "but selection is none"),
    ],
)
def test_what_cannot_work_together_is_refused(name, overrides, message):
    with pytest.raises(InputError) as error:
        resolve_method(name, ObjectiveConfig(**overrides))
    assert message in str(error.value)


def test_numbers_that_do_not_suit_the_run_are_refused_before_it():
    sizes = {"num_generations": 4, "max_completion_length": 100, "num_rewards": 1}
    with pytest.raises(
        InputError, match="expected a cache between 1 and max_completion_length=100"
    ):
        check_sizes(METHODS["dapo"], **sizes)
    check_sizes(resolve_method("dapo", ObjectiveConfig(parameters={"cache": 20.0})), **sizes)


def test_copies_of_a_step_are_drawn_from_its_generator():
    inputs = before_tokens(REWARDS)
    choice = use("resampled_by_power")
    draws = [
        apply("selection", choice, dataclasses.replace(inputs, generator=torch.Generator()))
        for _ in range(2)
    ]
    assert torch.equal(*draws)
