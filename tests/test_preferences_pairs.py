"""Pair losses against transcriptions differentiated by autograd, golden values, identities."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from fastrl.preferences import LOSSES, PairTerms

F64 = torch.float64
PAIR_LOSSES = sorted(name for name, loss in LOSSES.items() if loss.level == "pair")
SORTING = ("sorted_dpo", "sorted_margin_dpo")


def inputs(seed=0, num=7, dtype=F64):
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return (low + (high - low) * torch.rand(num, generator=generator, dtype=F64)).to(dtype)

    numbers = {}
    for role in ("chosen", "rejected", "companion"):
        lengths = torch.randint(1, 9, (num,), generator=generator)
        logps = -lengths * uniform(0.2, 2.0)
        numbers[f"{role}_lengths"] = lengths
        numbers[f"{role}_logps"] = logps
        numbers[f"{role}_ref_logps"] = logps + uniform(-4.0, 4.0)
        numbers[f"{role}_old_logps"] = logps + uniform(-4.0, 4.0)
        numbers[f"{role}_rewards"] = uniform(0.0, 1.0)
        numbers[f"{role}_alignments"] = uniform(-2.0, 1.0)
        numbers[f"{role}_from_reference"] = torch.rand(num, generator=generator) < 0.5
    return numbers


def call(name, numbers, **settings) -> PairTerms:
    loss = LOSSES[name]
    return loss.function(*(numbers[parameter] for parameter in loss.parameters), **settings)


def log_sigmoid(x):
    return torch.minimum(x, torch.zeros_like(x)) - torch.log1p(torch.exp(-x.abs()))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


class Pair:
    """One pair in the notation of the formulae: w chosen, l rejected, c companion."""

    def __init__(self, numbers, k):
        self.w, self.l, self.c = (
            numbers[f"{role}_logps"][k] for role in ("chosen", "rejected", "companion")
        )
        for letter, role in (("w", "chosen"), ("l", "rejected"), ("c", "companion")):
            for short, name in (
                ("ref", "ref_logps"), ("old", "old_logps"), ("r", "rewards"), ("t", "lengths"),
                ("a", "alignments"), ("flag", "from_reference"),
            ):  # fmt: skip
                setattr(self, f"{short}_{letter}", numbers[f"{role}_{name}"][k])
        self.dw, self.dl = self.w - self.ref_w, self.l - self.ref_l
        self.gap = self.dw - self.dl
        self.mw, self.ml = self.w / self.t_w, self.l / self.t_l


def dpo(p, beta=0.1):
    return -log_sigmoid(beta * p.gap)


def exo(p):
    u = 0.5 * p.gap
    return sigmoid(u) * (log_sigmoid(u) - math.log(0.999)) + sigmoid(-u) * (
        log_sigmoid(-u) - math.log(1e-3)
    )


def discopop(p):
    u = 0.05 * p.gap
    m = sigmoid(u / 0.05)
    return (1 - m) * -log_sigmoid(u) + m * torch.exp(-u)


def f_divergence(p, score):
    return -log_sigmoid(0.1 * (score(p.dw) - score(p.dl)))


def soft(p):
    q = sigmoid(p.r_w - p.r_l)
    return -q * log_sigmoid(0.1 * p.gap) - (1 - q) * log_sigmoid(-0.1 * p.gap)


def odds(mean):
    return mean - torch.log(1 - torch.exp(mean))


def orpo(p):
    return -0.1 * log_sigmoid(odds(p.mw) - odds(p.ml)) - p.mw


def inpo(p):
    eta, tau = 7.5e-3, 2.5e-3
    h = p.w - p.l - tau / eta * (p.ref_w - p.ref_l) - (eta - tau) / eta * (p.old_w - p.old_l)
    return (h - 1 / (2 * eta)) ** 2


def copg(p):
    weight = ((p.r_w - 0.1 * p.dw) - (p.r_l - 0.1 * p.dl)).detach()
    return -weight * (p.w - p.l)


def nca(p):
    s_w, s_l = 0.01 * p.dw, 0.01 * p.dl
    return -log_sigmoid(s_w) - 0.5 * log_sigmoid(-s_w) - 0.5 * log_sigmoid(-s_l)


def regression_of_both(p, draw):
    return ((p.dw - 1000 * (p.r_w - draw)) ** 2 + (p.dl - 1000 * (p.r_l - draw)) ** 2) / 2


def spac(p):
    data = ((p.w - p.old_w) + (p.l - p.old_l)) / 2
    u = 0.1 * ((p.w - p.old_w) - (p.l - p.old_l))
    return 0.1 * ((p.c - p.old_c) - data) - log_sigmoid(u)


FORMULAE = {
    "dpo": dpo,
    "conservative_dpo": lambda p: 0.9 * dpo(p) - 0.1 * log_sigmoid(-0.1 * p.gap),
    "robust_dpo": lambda p: (0.9 * dpo(p) + 0.1 * log_sigmoid(-0.1 * p.gap)) / 0.8,
    "soft_dpo": soft,
    "hinge": lambda p: torch.relu(1 - 0.05 * p.gap),
    "exo": exo,
    "discopop": discopop,
    "weighted_dpo": lambda p: min(1.0, math.exp(p.a_w + p.a_l)) * dpo(p, 0.01),
    "forward_kl_dpo": lambda p: f_divergence(p, lambda d: -torch.exp(-d)),
    "jensen_shannon_dpo": lambda p: f_divergence(p, lambda d: torch.log(2 * sigmoid(d))),
    "alpha_divergence_dpo": lambda p: f_divergence(p, lambda d: torch.exp(-0.5 * d) / -0.5),
    "nca": nca,
    "bco": lambda p: -log_sigmoid(0.01 * p.dw) - log_sigmoid(-0.01 * p.dl),
    "apo_zero": lambda p: 1 - sigmoid(0.1 * p.dw) + sigmoid(0.1 * p.dl),
    "apo_down": lambda p: sigmoid(0.1 * p.dw) + 1 - sigmoid(0.1 * p.gap),
    "regularised_dpo": lambda p: dpo(p, 0.01) - 0.005 * p.w,
    "constrained_dpo": lambda p: dpo(p) - p.mw,
    "exploratory_dpo": lambda p: dpo(p) + 1e-5 * (p.flag_w * p.w + p.flag_l * p.l),
    "simpo": lambda p: -log_sigmoid(2.0 * (p.mw - p.ml) - 1.0),
    "normalised_dpo": lambda p: -log_sigmoid(5.0 * (p.dw / p.t_w - p.dl / p.t_l)),
    "cpo": lambda p: -log_sigmoid(0.1 * (p.w - p.l)) - p.mw,
    "orpo": orpo,
    "slic": lambda p: torch.relu(1.0 - p.w + p.l) - 0.01 * p.c,
    "rationale_dpo": lambda p: dpo(p) - p.c / p.t_c,
    "rationale_sigmoid_dpo": lambda p: dpo(p) - log_sigmoid(p.c),
    "rationale_orpo": lambda p: orpo(p) - p.c / p.t_c,
    "spac": spac,
    "ipo": lambda p: (p.dw / p.t_w - p.dl / p.t_l - 5.0) ** 2,
    "ipo_sum": lambda p: (p.gap - 5.0) ** 2,
    "sppo": lambda p: ((p.dw - 500.0) ** 2 + (p.dl + 500.0) ** 2) / 2,
    "win_rate_sppo": lambda p: regression_of_both(p, 0.5),
    "general_preference": lambda p: regression_of_both(p, 0.0),
    "inpo": inpo,
    "rebel": lambda p: (((p.w - p.old_w) - (p.l - p.old_l)) - (p.r_w - p.r_l)) ** 2,
    "contrastive_policy_gradient": copg,
}  # fmt: skip


def test_every_loss_of_pairs_has_a_formula_here():
    assert sorted([*FORMULAE, *SORTING]) == PAIR_LOSSES


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(FORMULAE))
def test_losses_and_slopes_are_those_of_the_formula(name, seed):
    numbers = inputs(seed)
    leaves = {
        role: numbers[f"{role}_logps"].requires_grad_()
        for role in ("chosen", "rejected", "companion")
    }
    losses = torch.stack([FORMULAE[name](Pair(numbers, k)) for k in range(7)])
    losses.sum().backward()
    terms = call(name, {key: value.detach() for key, value in numbers.items()})
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(terms.losses, losses.detach(), **close)
    torch.testing.assert_close(terms.chosen_slopes, leaves["chosen"].grad, **close)
    torch.testing.assert_close(terms.rejected_slopes, leaves["rejected"].grad, **close)
    if terms.companion_slopes is None:
        assert leaves["companion"].grad is None
    else:
        torch.testing.assert_close(terms.companion_slopes, leaves["companion"].grad, **close)


@pytest.mark.parametrize("name", SORTING)
def test_losses_that_sort(name):
    numbers = inputs(3)
    chosen, rejected = (
        numbers["chosen_logps"].requires_grad_(),
        numbers["rejected_logps"].requires_grad_(),
    )
    ref_w, ref_l = numbers["chosen_ref_logps"], numbers["rejected_ref_logps"]
    left, right = (
        (chosen - ref_w, rejected - ref_l)
        if name == "sorted_dpo"
        else (chosen - rejected, ref_w - ref_l)
    )
    loss = sum(
        -log_sigmoid(0.1 * (a - b))
        for a, b in zip(left.sort().values, right.sort().values, strict=True)
    )
    loss.backward()
    terms = call(name, {key: value.detach() for key, value in numbers.items()})
    assert float(terms.losses.sum()) == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(terms.chosen_slopes, chosen.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.rejected_slopes, rejected.grad, rtol=1e-12, atol=0)


def test_sorting_one_pair_is_dpo():
    numbers = inputs(0, num=1)
    for name in SORTING:
        torch.testing.assert_close(
            call(name, numbers)[:3], call("dpo", numbers)[:3], rtol=1e-12, atol=0
        )


GOLDEN = {  # (settings, value, d / dL_w, d / dL_l)
    "dpo": ({}, 0.513015, -0.040131, 0.040131),
    "conservative_dpo": ({}, 0.553015, -0.030131, 0.030131),
    "robust_dpo": ({}, 0.463015, -0.052631, 0.052631),
    "hinge": ({}, 0.8, -0.05, 0.05),
    "ipo": ({}, 21.6225, -0.93, 0.465),
    "ipo_sum": ({}, 1.0, -2.0, 2.0),
    "exo": ({}, 0.458972, -0.257589, 0.257589),
    "nca": ({"beta": 0.1}, 1.303731, -0.013834, 0.023751),
    "apo_zero": ({}, 0.900578, -0.024446, 0.024938),
    "apo_down": ({}, 0.975755, 0.000420, 0.024026),
    "simpo": ({}, 0.913015, -0.119738, 0.059869),
    "cpo": ({}, 1.352978, -0.114185, 0.014185),
    "orpo": ({}, 1.251065, -0.105723, 0.002574),
    "regularised_dpo": ({"beta": 0.1}, 0.573015, -0.045131, 0.040131),
    "sppo": ({}, 248005.0, -497.0, 499.0),
    "inpo": ({}, 3927.111, -125.333, 125.333),
    "rebel": ({}, 9.0, 6.0, -6.0),
    "discopop": ({}, 0.814763, -0.036709, 0.036709),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_values(name, dtype):
    settings, *expected = GOLDEN[name]
    values = {
        "chosen_logps": -12.0, "rejected_logps": -30.0,
        "chosen_lengths": 10, "rejected_lengths": 20,
        "chosen_rewards": 1.0, "rejected_rewards": 0.0,
    } | {f"{role}_{policy}_logps": anchor for policy in ("ref", "old")
         for role, anchor in (("chosen", -15.0), ("rejected", -29.0))}  # fmt: skip
    numbers = {
        key: torch.tensor([value])
        if key.endswith("lengths")
        else torch.tensor([value], dtype=dtype)
        for key, value in values.items()
    }
    found = [float(term[0]) for term in call(name, numbers, **settings)[:3]]
    assert found == pytest.approx(expected, rel=1e-5, abs=6e-7)


def same(name, settings, numbers, other="dpo", other_settings=None, rtol=1e-12):
    terms, expected = (
        call(name, numbers, **settings),
        call(other, numbers, **(other_settings or {})),
    )
    torch.testing.assert_close(terms[:3], expected[:3], rtol=rtol, atol=1e-14)


def test_what_collapses_to_dpo():
    numbers = inputs(1)
    same("conservative_dpo", {"label_smoothing": 0.0}, numbers)
    same("robust_dpo", {"label_smoothing": 0.0}, numbers)
    same("soft_dpo", {}, numbers | {"chosen_rewards": numbers["chosen_rewards"] + 1e3})
    aligned = {
        f"{role}_alignments": torch.full((7,), 0.3, dtype=F64) for role in ("chosen", "rejected")
    }
    same("weighted_dpo", {"beta": 0.1}, numbers | aligned)
    same("regularised_dpo", {"beta": 0.1, "sft_coef": 0.0}, numbers)
    same("constrained_dpo", {"sft_coef": 0.0}, numbers)
    same("exploratory_dpo", {"bonus": 0.0}, numbers)
    ones = {f"{role}_lengths": torch.ones(7, dtype=torch.int64) for role in ("chosen", "rejected")}
    same("normalised_dpo", {"beta": 0.1}, numbers | ones)
    same("ipo", {}, numbers | ones, "ipo_sum")
    same("simpo", {"beta": 0.1, "margin": 0.0}, numbers | ones, "cpo", {"sft_coef": 0.0})


def test_alpha_of_zero_is_the_forward_kl_and_near_one_it_is_dpo():
    numbers = inputs(2)
    same("alpha_divergence_dpo", {"alpha": 0.0}, numbers, "forward_kl_dpo")
    same("alpha_divergence_dpo", {"alpha": 1 - 1e-7}, numbers, rtol=1e-5)


def test_inpo_anchors_at_the_reference_or_at_the_last_round():
    numbers = inputs(4)
    same("inpo", {"eta": 0.2, "tau": 0.2}, numbers, "ipo_sum", {"beta": 0.2})
    swapped = numbers | {
        f"{r}_ref_logps": numbers[f"{r}_old_logps"] for r in ("chosen", "rejected")
    }
    terms, expected = call("inpo", numbers, eta=0.2, tau=0.0), call("ipo_sum", swapped, beta=0.2)
    torch.testing.assert_close(terms[:3], expected[:3], rtol=1e-12, atol=0)


def test_sppo_with_a_draw_pulls_to_the_reference_and_scores_are_shifted_win_rates():
    numbers = inputs(5)
    half = torch.full((7,), 0.5, dtype=F64)
    terms = call("win_rate_sppo", numbers | {"chosen_rewards": half, "rejected_rewards": half})
    torch.testing.assert_close(
        terms.chosen_slopes, numbers["chosen_logps"] - numbers["chosen_ref_logps"]
    )
    shifted = numbers | {
        f"{r}_rewards": numbers[f"{r}_rewards"] - 0.5 for r in ("chosen", "rejected")
    }
    torch.testing.assert_close(call("win_rate_sppo", numbers), call("general_preference", shifted))


def test_rebel_and_copg_start_as_leave_one_out_policy_gradients():
    numbers = inputs(6)
    for role in ("chosen", "rejected"):
        numbers[f"{role}_ref_logps"] = numbers[f"{role}_old_logps"] = numbers[
            f"{role}_logps"
        ].clone()
    gaps = numbers["chosen_rewards"] - numbers["rejected_rewards"]
    # Of the loss of one of two sequences, a mean over both: -A / 2 with A = r_1 - r_2.
    torch.testing.assert_close(call("rebel", numbers, eta=3.0).chosen_slopes, 4 * 3.0 * -gaps / 2)
    torch.testing.assert_close(
        call("contrastive_policy_gradient", numbers).chosen_slopes, 2 * -gaps / 2
    )


def test_copg_with_rewards_of_a_quarter_is_ipo():
    numbers, quarter = inputs(7), torch.full((7,), 0.25, dtype=F64)
    numbers |= {"chosen_rewards": quarter, "rejected_rewards": -quarter}
    slopes = call("contrastive_policy_gradient", numbers, beta=0.3).chosen_slopes
    torch.testing.assert_close(slopes, 0.15 * call("ipo_sum", numbers, beta=0.3).chosen_slopes)


def test_the_classifier_moves_with_its_baseline():
    numbers = inputs(1)
    shifted = {f"{r}_logps": numbers[f"{r}_logps"] - 30.0 for r in ("chosen", "rejected")}
    terms = call("bco", numbers | shifted, score_baseline=-0.3)
    torch.testing.assert_close(terms[:3], call("bco", numbers)[:3], rtol=1e-11, atol=0)


def test_past_their_margin_hinges_rest():
    numbers = inputs(1)
    numbers["chosen_logps"] = numbers["chosen_logps"] + 60.0
    for name in ("hinge", "slic"):
        terms = call(name, numbers)
        assert not terms.chosen_slopes.any()
        assert not terms.rejected_slopes.any()


def test_exo_is_still_where_its_labels_are():
    numbers = inputs(0, num=1)
    gap = math.log(0.999 / 1e-3) / 0.5
    reference = (
        numbers["chosen_logps"] - numbers["rejected_logps"] + numbers["rejected_ref_logps"] - gap
    )
    terms = call("exo", numbers | {"chosen_ref_logps": reference})
    assert abs(float(terms.chosen_slopes)) < 1e-15
    assert abs(float(terms.losses)) < 1e-15


@pytest.mark.parametrize("gap", [-5e4, 5e4])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_extreme_log_ratios_stay_finite(name, gap):
    numbers = inputs(0, dtype=torch.float32)
    numbers["chosen_logps"] = numbers["chosen_logps"] - abs(gap)
    for policy in ("ref", "old"):
        numbers[f"chosen_{policy}_logps"] = numbers["chosen_logps"] - gap
    for term in call(name, numbers):
        assert term is None or (torch.isfinite(term).all() and term.dtype == torch.float32)


def test_past_a_clamp_there_is_no_slope():
    numbers = inputs(0)
    numbers["chosen_ref_logps"] = numbers["chosen_logps"] + 10.5
    assert not call("forward_kl_dpo", numbers).chosen_slopes.any()
    assert not call("alpha_divergence_dpo", numbers).chosen_slopes.any()
    numbers["chosen_logps"] = torch.full((7,), -1e-9, dtype=F64)
    terms = call("orpo", numbers)
    torch.testing.assert_close(terms.chosen_slopes, -1.0 / numbers["chosen_lengths"].to(F64))
    numbers["chosen_ref_logps"] = numbers["chosen_logps"] + 1000.0
    inside = -0.05 * sigmoid(torch.tensor(50.0, dtype=F64))
    torch.testing.assert_close(call("discopop", numbers).chosen_slopes[0], inside, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_no_pairs_give_no_terms_and_inputs_are_not_changed(name):
    terms = call(name, inputs(0, num=0))
    assert terms.losses.shape == terms.chosen_slopes.shape == (0,)
    numbers = inputs(0)
    before = {key: value.clone() for key, value in numbers.items()}
    call(name, numbers)
    assert all(torch.equal(before[key], value) for key, value in numbers.items())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("robust_dpo", {"label_smoothing": 0.5}),
        ("exo", {"label_smoothing": 0.0}),
        ("alpha_divergence_dpo", {"alpha": 1.0}),
        ("inpo", {"tau": 0.1}),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name, settings):
    with pytest.raises(ValueError, match="expected"):
        call(name, inputs(), **settings)


def test_every_hyper_parameter_has_a_default():
    for loss in LOSSES.values():
        for parameter in inspect.signature(loss.function).parameters.values():
            assert (parameter.kind is parameter.KEYWORD_ONLY) == (
                parameter.default is not parameter.empty
            )
