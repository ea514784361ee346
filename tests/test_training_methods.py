"""Every trainable method in a step of a real run, and coefficients that follow measurements."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastrl.config import DataConfig, EvalConfig, ObjectiveConfig, SaveConfig, WarmStartConfig
from fastrl.errors import InputError
from fastrl.loss import token_statistics
from fastrl.methods import METHODS
from fastrl.methods.adaptation import Adaptation
from fastrl.methods.record import Method, Penalty, use
from fastrl.methods.resolve import resolve_method
from fastrl.packing import pack
from fastrl.report import read_metrics
from fastrl.run import train
from tests.helpers import random_rollouts, tiny_policy
from tests.helpers_methods import SIZES
from tests.test_training import tiny_config, weights

TRAINABLE = [name for name, method in METHODS.items() if not method.missing]
EVERY = (  # what each method reports, where it has a meaning for it
    "loss", "grad_norm", "entropy", "ratio/max", "old_kl/k1", "old_kl/k2", "old_kl/k3",
    "frac_reward_zero_std",
)  # fmt: skip
OF_ADVANTAGES = (
    "advantages/zero_fraction", "clip_ratio/low_mean", "clip_ratio/high_mean",
    "clip_ratio/dual_mean",
)  # fmt: skip


def steps_of(directory):
    return [row for row in read_metrics(directory) if "loss" in row]


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_method_trains(tmp_path, name):
    """Two updates on the same completions, so that ratios differ from 1 in the second."""
    method = METHODS[name]
    rollout = tiny_config("").rollout
    rollout = dataclasses.replace(rollout, num_generations=2 if name in ("p3o", "rebel") else 4)
    config = tiny_config(
        tmp_path / "run", method=name, max_steps=1, num_iterations=2,
        objective={"parameters": SIZES.get(name, {})},
        rollout=rollout, warm_start=WarmStartConfig(), data=DataConfig(eval_size=2),
        eval=EvalConfig(num_samples=1),
    )  # fmt: skip
    train(config)
    (row,) = steps_of(tmp_path / "run")
    if row.get("advantages/zero_fraction") == 1:  # no token was trained, so none was measured
        assert row["grad_norm"] == 0
        return
    names = EVERY if method.loss is not None else (*EVERY, *OF_ADVANTAGES)
    assert torch.isfinite(torch.tensor([row[key] for key in names])).all(), row
    # The first update may take every ratio out of bounds, or every margin past its hinge.
    assert row["grad_norm"] > 0 or row.get("clip_ratio/region_mean") == 1 or row["loss"] == 0
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "run").values())


@pytest.mark.parametrize("name", ["gspo", "dpo", "tis", "reinforce_pp"])
def test_same_seed_same_bits(tmp_path, name):
    for run in ("a", "b"):
        train(tiny_config(tmp_path / run, method=name, max_steps=2))
    for key, value in weights(tmp_path / "a").items():
        assert torch.equal(value, weights(tmp_path / "b")[key]), key


def make_method(**changes) -> Method:
    return Method("m", "", "", **changes)


def test_a_target_entropy_moves_the_bonus():
    choice = use("target_entropy", target_entropy=1.0, step_size=0.25, lowest=0.0, highest=0.6)
    method = make_method(controllers=(choice,), entropy_coef=0.5)
    adaptation = Adaptation(method)
    found = []
    for entropy in (0.5, 0.5, 2.0, 2.0, 2.0, 2.0):
        method = adaptation.update(method, {"entropy": entropy}, 8)
        found.append(method.entropy_coef)
    assert found == pytest.approx([0.6, 0.6, 0.35, 0.1, 0.0, 0.0])
    assert adaptation.update(method, {}, 8) == method


def test_kl_controllers_move_their_betas():
    method = make_method(
        surrogate=use("kl_penalised_ratio", beta=1.0),
        penalties=(Penalty(use("k3"), 0.1), Penalty(use("k2"), 0.3)),
        controllers=(use("doubling_kl", target=0.01), use("adaptive_kl", target=2.0, horizon=100)),
    )
    adaptation = Adaptation(method)
    method = adaptation.update(method, {"old_kl/k3": 0.02, "kl": 100.0}, 50)
    assert method.surrogate.parameters["beta"] == 2.0
    assert [penalty.beta for penalty in method.penalties] == [pytest.approx(0.11), 0.3]
    method = adaptation.update(method, {"old_kl/k3": 0.001, "kl": 1.8}, 50)
    assert method.surrogate.parameters["beta"] == 1.0
    assert method.penalties[0].beta == pytest.approx(0.11 * (1 - 0.1 * 0.5))
    again = Adaptation(method)
    loaded = again.load_state_dict(json.loads(json.dumps(adaptation.state_dict())), method)
    assert loaded == method
    assert again.state_dict() == adaptation.state_dict()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (use("target_entropie"), "target_entropy"),
        (use("target_entropy", target=1.0), "has no 'target'"),
        (use("doubling_kl"), "a beta of 0 would stay 0"),
        (use("target_entropy", target_entropy=1.0), "missing"),
    ],
)
def test_controllers_that_cannot_work(choice, message):
    with pytest.raises(InputError, match=message):
        Adaptation(make_method(controllers=(choice,)))


@pytest.mark.parametrize("name", ["entropy_adaptive", "trpo_penalty"])
def test_resume_keeps_what_controllers_know(tmp_path, name):
    whole = tiny_config(tmp_path / "whole", method=name, max_steps=4, num_iterations=2)
    train(whole)
    parted = dataclasses.replace(
        whole, output_dir=str(tmp_path / "parted"), save=SaveConfig(save_steps=2)
    )
    train(dataclasses.replace(parted, max_steps=2))
    train(parted, resume=True)
    state = json.loads((tmp_path / "parted/checkpoint-4/trainer_state.json").read_text())
    assert state["controllers"]
    for key, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parted")[key]), key


def test_d3s_is_aggressive_first_and_relaxes(tmp_path):
    """Of 24 completions a fourth is kept, then more, and of their tokens a fifth, then more."""
    rollout = dataclasses.replace(tiny_config("").rollout, num_generations=8)
    objective = {"parameters": {"num_kept": 4}}
    train(tiny_config(tmp_path / "run", method="d3s", rollout=rollout, objective=objective))
    rows = steps_of(tmp_path / "run")
    shares = [0.2 + 0.8 * step / 4 for step in range(4)]
    assert [row["schedules/token_weights.fraction"] for row in rows] == pytest.approx(shares)
    for row, share, kept in zip(rows, shares, [6, 7, 9, 10], strict=True):  # 24 (1 + step / 4) / 4
        trained = 24 * row["completions/mean_length"] - row["down_sampling/rows_skipped"]
        assert 24 - row["down_sampling/completions_dropped"] <= kept
        assert trained <= share * 5 * kept
        assert trained >= int(share * kept)  # every completion has at least one token


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_capo_knows_the_gradient_of_every_token_with_respect_to_the_head(temperature):
    """|d logp / dW|^2 = (1 - 2 p + sum p^2) |h|^2, the step that its rule weighs; by autograd."""
    policy = tiny_policy(dtype=torch.float64)
    rollouts = random_rollouts([5, 3], [[4, 2], [1, 6]])
    plan = pack(
        rollouts.prompts.token_ids, [rollouts.completion_ids[:2], rollouts.completion_ids[2:]]
    )
    found = token_statistics(policy, plan, temperature)
    scores = 1 - 2 * found.logps.exp() + found.head.sum_p2
    hidden = policy.hidden_states(plan).detach()[plan.source_index]
    weight = policy.lm_head.weight.detach().requires_grad_()
    logps = (hidden @ weight.T / temperature).log_softmax(dim=1)
    for token, target in enumerate(plan.target_ids.tolist()):
        (gradient,) = torch.autograd.grad(logps[token, target], weight, retain_graph=True)
        expected = gradient.square().sum()
        torch.testing.assert_close(scores[token] * found.squared_hidden_norms[token], expected)


def test_a_ratio_to_the_sampler_leaves_no_correction():
    with pytest.raises(InputError, match="count them twice"):
        resolve_method("dppo_tv", ObjectiveConfig(rollout_correction="truncated_tokens"))


def short_config(directory, objective, **changes):
    return tiny_config(
        directory, max_steps=1, objective=objective, warm_start=WarmStartConfig(),
        data=DataConfig(eval_size=2), eval=EvalConfig(num_samples=1), **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    "objective",
    [
        {"selection": "max_variance_advantages", "parameters": {"num_kept": 2.0}},
        {"selection": "best_and_worst", "token_weights": "advantage_entropy"},
        {"selection": "off_policy_sequence_mask", "surrogate": "geometric_token_ratio"},
    ],
    ids=lambda objective: objective["selection"],
)
def test_selections_that_look_at_tokens_and_leave_completions_out(tmp_path, objective):
    train(short_config(tmp_path / "run", objective))
    (row,) = steps_of(tmp_path / "run")
    assert row["grad_norm"] > 0


def test_none_takes_a_choice_away(tmp_path):
    for shaping in (None, "none"):
        run = tmp_path / f"run-{shaping}"
        train(
            short_config(run, {} if shaping is None else {"reward_shaping": shaping}, method="rloo")
        )
        assert (run / "reference").is_dir() == (shaping is None)
    assert resolve_method("tis", ObjectiveConfig(rollout_correction="none")).choices == (
        METHODS["grpo"].choices
        | {"aggregation": METHODS["tis"].aggregation, "advantage": METHODS["tis"].advantage}
    )
    with pytest.raises(InputError, match=r"unknown objective\.advantage 'none'"):
        resolve_method("grpo", ObjectiveConfig(advantage="none"))
    with pytest.raises(InputError, match="must be a whole number"):
        resolve_method(
            "grpo", ObjectiveConfig(selection="max_variance", parameters={"num_kept": 2.5})
        )
