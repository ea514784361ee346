"""Surrogates: published numbers, the slope on-policy, and what equals what."""

import math

import pytest
import torch

from fastrl_kernels.objectives import SURROGATES
from tests.objective_formulas import close, make_tokens, run

NAMES = sorted(SURROGATES)
INFINITY = math.inf

GOLDEN_INPUTS = [  # A, d, logp
    (1.0, 0.0, -1.0), (1.0, 0.4, -0.7), (1.0, -0.5, -1.5), (-1.0, 0.0, -1.0), (-1.0, 0.4, -0.7),
    (-1.0, -0.5, -1.5), (-1.0, 1.4, -0.2), (0.5, 0.1, -2.0),
]  # fmt: skip
GOLDEN = {
    "clipped_ratio": (
        (1.0, 1.28, 0.606531, -1.0, -1.491825, -0.8, -4.0552, 0.552585),
        (1.0, 0.0, 0.606531, -1.0, -1.491825, 0.0, -4.0552, 0.552585),
    ),
    "dual_clipped_ratio": (
        (1.0, 1.28, 0.606531, -1.0, -1.491825, -0.8, -3.0, 0.552585),
        (1.0, 0.0, 0.606531, -1.0, -1.491825, 0.0, 0.0, 0.552585),
    ),
    "truncated_importance": (
        (-1.0, -1.044277, -0.909796, 1.0, 1.044277, 0.909796, 0.81104, -1.105171),
        (1.0, 1.491825, 0.606531, -1.0, -1.491825, -0.606531, -4.0552, 0.552585),
    ),
    "soft_gated_ratio": (
        (2.0, 2.482145, 1.61153, -1.904762, -2.38594, -1.516795, -3.661458, 1.052537),
        (1.0, 1.405126, 0.583648, -1.0, -1.396622, -0.581368, -0.605954, 0.55106),
    ),
    "quadratic_ratio": (
        (1.0, 0.887096, 0.219485, -1.0, -2.096554, -0.993576, -27.390817, 0.538759),
        (1.0, -2.176756, 1.799787, -1.0, -5.160406, 0.586725, -66.002434, 0.262006),
    ),
    "kl_penalised_ratio": (
        (1.0, 1.482642, 0.595878, -1.0, -1.501007, -0.617184, -4.22072, 0.552068),
        (1.0, 1.442642, 0.645878, -1.0, -1.541007, -0.567184, -4.36072, 0.542068),
    ),
    "mirror_descent": (
        (1.0, 1.282014, 0.426123, -1.0, -1.701635, -0.786939, -9.29936, 0.541893),
        (1.0, 0.298365, 1.213061, -1.0, -2.685284, 0.0, -15.40976, 0.331551),
    ),
    "drift": (
        (1.0, 1.482145, 0.606531, -1.0, -1.491825, -0.697174, -4.0552, 0.552573),
        (1.0, 1.405126, 0.606531, -1.0, -1.491825, -0.14105, -4.0552, 0.552204),
    ),
    "negative_aware": (
        (0.0, 0.4, -0.5, 0.0, 0.0, 0.232946, 0.0, 0.1),
        (1.0, 1.0, 1.0, -0.666667, -0.99455, -0.320328, -2.703467, 1.0),
    ),
    "linear_bound": (
        (1.0, 1.4, 0.5, -1.0, -1.491825, -0.606531, -4.0552, 0.55),
        (1.0, 1.0, 1.0, -1.0, -1.491825, -0.606531, -4.0552, 0.5),
    ),
    "shaped_probability": (
        (0.78627, 0.832379, 0.690527, -0.78627, -0.832379, -0.690527, -0.891154, 0.287537),
        (0.16805, 0.139524, 0.213699, -0.16805, -0.139524, -0.213699, -0.096998, 0.122182),
    ),
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_values(name: str) -> None:
    advantages, log_ratios, logps = torch.tensor(GOLDEN_INPUTS, dtype=torch.float64).T
    result = run(name, logps, logps - log_ratios, advantages)
    for got, expected in zip(result, GOLDEN[name], strict=True):
        close(got, torch.tensor(expected, dtype=torch.float64), 6e-7)


@pytest.mark.parametrize(
    "name",
    sorted(
        set(NAMES)
        - {"log_likelihood", "negative_aware", "shaped_probability", "shaped_probability_ratio"}
    ),
)
def test_on_policy_slope_is_the_advantage(name: str) -> None:
    logps, _, _, advantages = make_tokens()
    _, slope = run(name, logps, logps, advantages)
    assert torch.equal(slope, advantages)


def test_on_policy_slope_of_the_others() -> None:
    logps, _, _, advantages = make_tokens()
    _, slope = run("negative_aware", logps, logps, advantages)
    negative = torch.where(advantages < 0, -0.4 / 0.6, 0.0).double()
    close(slope, torch.where(advantages > 0, 1.0, negative), 1e-7)
    _, slope = run("shaped_probability_ratio", logps, logps, advantages)
    close(slope, advantages * 0.1 / (logps.exp() + 0.1))
    _, slope = run("log_likelihood", logps, logps, advantages)
    assert torch.equal(slope, torch.ones_like(logps))


def test_dual_clip_is_the_second_bound_of_the_two_sided_clip() -> None:
    logps, old_logps, _, advantages = make_tokens()
    tokens = (logps, old_logps, advantages)
    both = [run(f"{x}_clipped_ratio", *tokens) for x in ("dual", "two_sided")]
    assert (both[0][1] != run("clipped_ratio", *tokens)[1]).any()
    for got, expected in zip(*both, strict=True):
        close(got, expected)
    unbounded = run("dual_clipped_ratio", *tokens, hyper=(0.2, 0.28, INFINITY))
    bounded = run("bounded_ratio", *tokens, hyper=(1.0 - 0.2, 1.0 + 0.28, INFINITY))
    for results in zip(unbounded, bounded, run("clipped_ratio", *tokens), strict=True):
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[2])


def test_one_sided_mask_has_the_slope_of_the_clip() -> None:
    logps, old_logps, _, advantages = make_tokens()
    value, slope = run("one_sided_masked_ratio", logps, old_logps, advantages, hyper=(0.8, 1.28))
    clipped, clipped_slope = run("clipped_ratio", logps, old_logps, advantages, hyper=(0.2, 0.28))
    assert torch.equal(slope, clipped_slope)
    stopped = (slope == 0) & (advantages != 0)
    assert torch.equal(value[~stopped], clipped[~stopped])
    bound = torch.where(advantages > 0, 1.28, 0.8).double()
    inside = stopped & ((logps - old_logps).abs() < 20)
    close((clipped - value)[inside], (bound * advantages)[inside], 1e-7)


def test_truncation_far_out_has_the_slope_of_the_importance_ratio() -> None:
    logps, old_logps, _, advantages = (x[3:] for x in make_tokens())
    _, slope = run("truncated_importance", logps, old_logps, advantages, hyper=(1.0, INFINITY))
    assert torch.equal(slope, run("importance_ratio", logps, old_logps, advantages)[1])
