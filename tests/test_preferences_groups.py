"""Losses of groups and of single completions against loops differentiated by autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastrl.preferences import LOSSES, SequenceTerms

F64 = torch.float64
GROUP_LOSSES = sorted(name for name, loss in LOSSES.items() if loss.level == "group")
GROUPS = torch.tensor([2, 0, 2, 4, 0, 2, 5, 0, 2, 4, 5, 1])  # no prompt 3; prompt 1 has one
LENGTHS = torch.tensor([3, 5, 0, 2, 1, 4, 0, 7, 2, 6, 3, 2])  # prompt 5 is left with one


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logps = -LENGTHS * (0.2 + torch.rand(12, generator=generator, dtype=F64))
    labels = torch.randint(0, 4, (12,), generator=generator).to(F64) / 3
    return {
        "sequence_logps": logps,
        "sequence_ref_logps": logps + 2 * torch.randn(12, generator=generator, dtype=F64),
        "sequence_old_logps": logps + 2 * torch.randn(12, generator=generator, dtype=F64),
        "sequence_advantages": torch.randn(12, generator=generator, dtype=F64),
        "rewards": labels,
        "groups": GROUPS,
        "lengths": LENGTHS,
    }


def call(name, numbers, **settings) -> SequenceTerms:
    loss = LOSSES[name]
    return loss.function(*(numbers[parameter] for parameter in loss.parameters), **settings)


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def exo(s, r, **_):
    log_q, log_p = torch.log_softmax(0.5 * s, 0), torch.log_softmax(r / 0.5, 0)
    return (log_q.exp() * (log_q - log_p)).sum()


def info_nca(s, r, **_):
    return -(torch.softmax(r / 0.01, 0) * torch.log_softmax(0.01 * s, 0)).sum()


def list_softmax(s, r, **_):
    return -(r * torch.log_softmax(0.05 * s, 0)).sum()


def plackett_luce(s, r, **_):
    order = sorted(range(len(r)), key=lambda i: (-float(r[i]), i))
    ranked = 0.1 * s[order]
    return -sum(ranked[k] - torch.logsumexp(ranked[k:], 0) for k in range(len(order)))


def lambda_rank(s, r, **_):
    s = 0.05 * s
    order = sorted(range(len(r)), key=lambda i: (-float(s[i].detach()), i))
    discount = {i: 1 / math.log(1 + rank) for rank, i in enumerate(order, start=1)}
    total = torch.zeros((), dtype=F64)
    for i, j in itertools.permutations(range(len(r)), 2):
        if r[i] > r[j]:
            weight = abs(2 ** float(r[i]) - 2 ** float(r[j])) * abs(discount[i] - discount[j])
            total = total - weight * log_sigmoid(s[i] - s[j])
    return total


def rank_hinge(s, r, logps, lengths, **_):
    means = logps / lengths
    pairs = [(i, j) for i, j in itertools.permutations(range(len(r)), 2) if r[i] > r[j]]
    return sum((torch.relu(means[j] - means[i]) for i, j in pairs), torch.zeros((), dtype=F64))


def trpa(s, r, lengths, **_):
    ratios = s / lengths
    pairs = [(i, j) for i, j in itertools.permutations(range(len(r)), 2) if r[i] > r[j]]
    if not pairs:
        sign = 1.0 if r[0] >= 1.0 else -1.0
        return -log_sigmoid(sign * ratios).mean()
    losses = [
        -log_sigmoid((2.3 if r[i] >= 1.0 else 1.0) * 0.1 * (ratios[i] - ratios[j]))
        for i, j in pairs
    ]
    return torch.stack(losses).mean()


LIST_FORMULAE = {
    "list_wise_exo": exo,
    "info_nca": info_nca,
    "list_softmax": list_softmax,
    "plackett_luce": plackett_luce,
    "lambda_rank": lambda_rank,
    "rank_hinge": rank_hinge,
}


def kto(d, r, **_):
    desirable = r > 0
    z = 0.1 * 0.7
    up, down = torch.sigmoid(0.1 * d - z), torch.sigmoid(z - 0.1 * d)
    return torch.where(desirable, 1.5 * (1 - up), 0.8 * (1 - down)).sum()


def gvpo(r, old, logps, **_):
    d = logps - old
    bracket = ((r - r.mean()) - 1.0 * (d - d.mean())).detach()
    return -(bracket * logps).sum()


def opmd(r, old, logps, **_):
    return (-(r - r.mean()) * logps + 0.05 * (logps - old) ** 2).sum()


def apostar(d, advantages, **_):
    return ((1e-3 * d - advantages) ** 2).sum()


COMPLETION_FORMULAE = {
    "kto": kto,
    "group_variance": gvpo,
    "mirror_descent": opmd,
    "optimal_advantage_regression": apostar,
}
SETTINGS = {
    "level_preference": {"top_weight": 2.3},
    "kto": {"mismatched_log_ratio": 0.7, "desirable_weight": 1.5, "undesirable_weight": 0.8},
}


def test_every_group_loss_has_a_formula_here():
    assert sorted([*LIST_FORMULAE, *COMPLETION_FORMULAE, "level_preference"]) == GROUP_LOSSES


def by_loops(name, numbers):
    """Loss and its gradient, of a loop over prompts without their empty completions."""
    logps = numbers["sequence_logps"].clone().requires_grad_()
    total, num_lists, num_groups = torch.zeros((), dtype=F64), 0, 0
    for prompt in range(6):
        mine = [i for i in range(12) if GROUPS[i] == prompt and LENGTHS[i] > 0]
        if not mine or (name in LIST_FORMULAE and len(mine) < 2):
            continue
        num_lists, num_groups = num_lists + len(mine), num_groups + 1
        delta = (logps - numbers["sequence_ref_logps"])[mine]
        formula = {**LIST_FORMULAE, **COMPLETION_FORMULAE, "level_preference": trpa}[name]
        arguments = {
            "s": delta, "d": delta, "r": numbers["rewards"][mine], "logps": logps[mine],
            "lengths": LENGTHS[mine], "old": numbers["sequence_old_logps"][mine],
            "advantages": numbers["sequence_advantages"][mine],
        }  # fmt: skip
        total = total + formula(**arguments)
    total = total / (num_lists if name in COMPLETION_FORMULAE else num_groups)
    total.backward()
    return total.detach(), logps.grad


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_losses_and_slopes_are_those_of_loops(name, seed):
    numbers = inputs(seed)
    if name == "kto":
        numbers["rewards"] = numbers["rewards"] - 0.5
    loss, gradient = by_loops(name, numbers)
    terms = call(name, numbers, **SETTINGS.get(name, {}))
    assert float(terms.losses.sum()) == pytest.approx(float(loss), rel=1e-11, abs=1e-13)
    torch.testing.assert_close(terms.slopes, gradient, rtol=1e-10, atol=1e-13)
    assert not terms.slopes[LENGTHS == 0].any()
    assert not terms.losses[LENGTHS == 0].any()


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_left_out_completions_may_hold_anything(name):
    numbers, spoilt = inputs(), inputs()
    for key in spoilt:
        if spoilt[key].is_floating_point() and key != "rewards":
            spoilt[key][LENGTHS == 0] = torch.nan
    for whole, other in zip(call(name, numbers), call(name, spoilt), strict=True):
        assert torch.equal(whole, other)


def two(seed=0, rewards=(1.0, 0.0), lengths=(1, 1)):
    generator = torch.Generator().manual_seed(seed)
    numbers = {
        f"sequence_{name}": torch.randn(2, generator=generator, dtype=F64)
        for name in ("logps", "ref_logps", "old_logps", "advantages")
    }
    zeros = torch.zeros(2, dtype=torch.int64)
    return numbers | {
        "rewards": torch.tensor(rewards, dtype=F64), "groups": zeros,
        "lengths": torch.tensor(lengths),
    }  # fmt: skip


def as_pair(name, numbers, **settings):
    columns = (numbers["sequence_logps"], numbers["sequence_ref_logps"])
    arguments = [column[k : k + 1] for column in columns for k in (0, 1)]
    return LOSSES[name].function(*arguments, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "pair", "factor"),
    [
        ("plackett_luce", {}, ("dpo", {"beta": 0.1}), 1.0),
        ("info_nca", {"reward_temperature": 1e-4, "beta": 0.1}, ("dpo", {"beta": 0.1}), 1.0),
        ("level_preference", {"top_weight": 1.0}, ("dpo", {"beta": 0.1}), 1.0),
        ("lambda_rank", {}, ("dpo", {"beta": 0.05}), 1 / math.log(2) - 1 / math.log(3)),
        ("list_wise_exo", {"reward_temperature": 1 / math.log(999.0)}, ("exo", {}), 1.0),
    ],
)
def test_lists_of_two_are_pairs(name, settings, pair, factor):
    for seed in range(3):
        numbers = two(seed)
        terms, expected = call(name, numbers, **settings), as_pair(pair[0], numbers, **pair[1])
        assert float(terms.losses.sum()) == pytest.approx(
            factor * float(expected.losses), rel=1e-10
        )
        slopes = [factor * float(expected.chosen_slopes), factor * float(expected.rejected_slopes)]
        assert terms.slopes.tolist() == pytest.approx(slopes, rel=1e-10)
    assert 1 / math.log(2) - 1 / math.log(3) == pytest.approx(0.5325, abs=1e-4)


def test_the_regression_starts_as_reinforce_with_the_optimal_value_as_baseline():
    numbers = inputs()
    numbers["sequence_ref_logps"] = numbers["sequence_logps"].clone()
    slopes = call("optimal_advantage_regression", numbers).slopes
    counted = LENGTHS > 0
    expected = -2 * 1e-3 * numbers["sequence_advantages"] * counted / counted.sum()
    torch.testing.assert_close(slopes, expected, rtol=1e-13, atol=0)


def test_golden_residual_of_the_regression():
    value = 0.5 * math.log(1 + 0.25 * math.expm1(2.0))
    numbers = {
        "sequence_logps": torch.tensor([-20.0], dtype=F64),
        "sequence_ref_logps": torch.zeros(1, dtype=F64),
        "sequence_advantages": torch.tensor([1.0 - value], dtype=F64), "lengths": torch.tensor([9]),
    }  # fmt: skip
    terms = call("optimal_advantage_regression", numbers)
    assert float(terms.losses) == pytest.approx(0.294600, abs=1e-6)
    assert float(terms.slopes) == pytest.approx(-1.085541e-3, abs=1e-9)


def test_group_variance_and_mirror_descent_start_as_centred_policy_gradients():
    numbers = inputs()
    numbers["sequence_old_logps"] = numbers["sequence_logps"].clone()
    first, second = (call(name, numbers).slopes for name in ("group_variance", "mirror_descent"))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)
    zero = [0, 1, 2, 4, 5]
    for prompt in zero:
        mine = (prompt == GROUPS) & (LENGTHS > 0)
        centred = numbers["rewards"][mine] - numbers["rewards"][mine].mean()
        torch.testing.assert_close(first[mine], -centred / 10, rtol=1e-12, atol=1e-15)


def test_group_variance_is_the_gradient_of_a_variance_and_sums_to_zero():
    numbers = inputs(3)
    logps = numbers["sequence_logps"].clone().requires_grad_()
    total = torch.zeros((), dtype=F64)
    for prompt in range(6):
        mine = (prompt == GROUPS) & (LENGTHS > 0)
        if mine.any():
            errors = 0.7 * (logps - numbers["sequence_old_logps"])[mine] - numbers["rewards"][mine]
            total = total + (errors - errors.mean()).square().sum() / (2 * 0.7)
    total.backward()
    slopes = call("group_variance", numbers, beta=0.7).slopes
    torch.testing.assert_close(slopes * 10, logps.grad, rtol=1e-11, atol=1e-13)
    for prompt in range(6):
        assert abs(float(slopes[prompt == GROUPS].sum())) < 1e-15


def test_equal_rewards_teach_a_ranking_nothing():
    numbers = inputs()
    numbers["rewards"] = torch.full((12,), 0.3, dtype=F64)
    for name in ("lambda_rank", "rank_hinge"):
        assert not call(name, numbers).slopes.any()


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_all_empty_is_zero(name):
    numbers = inputs() | {"lengths": torch.zeros(12, dtype=torch.int64)}
    terms = call(name, numbers)
    assert torch.equal(terms.losses, torch.zeros(12, dtype=F64))
    assert torch.equal(terms.slopes, torch.zeros(12, dtype=F64))


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_extreme_log_ratios_stay_finite(name):
    numbers = inputs()
    numbers["sequence_ref_logps"] = numbers["sequence_ref_logps"] + 1e5 * (-1.0) ** torch.arange(12)
    for term in call(name, numbers):
        assert torch.isfinite(term).all()


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_float32_is_kept(name):
    exact = call(name, inputs())
    numbers = {k: v.float() if v.is_floating_point() else v for k, v in inputs().items()}
    terms = call(name, numbers)
    assert terms.losses.dtype == terms.slopes.dtype == torch.float32
    torch.testing.assert_close(terms.slopes.double(), exact.slopes, rtol=1e-4, atol=1e-5)


def test_without_weights_desirable_and_undesirable_completions_count_alike():
    numbers = inputs()
    numbers["sequence_ref_logps"] = numbers["sequence_logps"].clone()
    expected = 0.1 * 0.25 / 10 * torch.where(numbers["rewards"] > 0, -1.0, 1.0) * (LENGTHS > 0)
    torch.testing.assert_close(call("kto", numbers).slopes, expected.to(F64), rtol=1e-7, atol=0)
