"""Sequence-level surrogates against loops over completions, autograd, golden values, identities."""

from __future__ import annotations

import math

import pytest
import torch

from fastrl.sequence_surrogates import (
    SEQUENCE_SURROGATES,
    balanced_bounds,
    clipped_geometric_ratio,
    clipped_sequence_ratio,
    geometric_ratio,
    geometric_token_ratio,
    pairwise_clipped,
    pairwise_jointly_clipped,
    sequence_tempered,
    tapered_sequence,
)

F64 = torch.float64
LENGTHS = [3, 1, 0, 7, 2, 5]  # completion 2 is empty
GROUPS = torch.tensor([1, 0, 2, 0, 2, 1])  # two a prompt, in no order
INDEX = torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS))
GOLDEN_D = torch.tensor([0.02, -0.01, 0.03, 0.0], dtype=F64)
ONE = torch.zeros(4, dtype=torch.int64)


def batch(seed=0, spread=0.2, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(INDEX.shape[0], generator=generator, dtype=F64) - 0.1
    old_logps = logps + spread * torch.randn(INDEX.shape[0], generator=generator, dtype=F64)
    rewards = torch.tensor([1.0, -0.5, 0.3, 0.7, 0.0, 2.0], dtype=F64)
    advantages = torch.tensor([1.0, -0.7, 0.2, -1.3, 0.0, 0.4], dtype=F64)[INDEX]
    return {
        "logps": logps.to(dtype), "old_logps": old_logps.to(dtype), "rewards": rewards,
        "advantages": advantages.to(dtype), "groups": GROUPS, "completion_index": INDEX,
    }  # fmt: skip


def call(name, data, **settings):
    function = SEQUENCE_SURROGATES[name]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return function(*(data[n] for n in names), **settings)


def clip(x, low, high):
    return torch.minimum(
        torch.maximum(x, torch.tensor(low, dtype=F64)), torch.tensor(high, dtype=F64)
    )


def ppo(ratio, a, low, high):
    return torch.minimum(ratio * a, clip(ratio, low, high) * a)


def gspo(l, d, a, **_):  # noqa: E741
    s = d.mean().exp()
    return ppo(s, a[0], 1 - 0.05, 1 + 0.06)


def gspo_token(l, d, a, **_):  # noqa: E741
    s = d.mean().exp().detach()
    return torch.stack(
        [ppo(s * (x - x.detach()).exp(), y, 0.95, 1.06) for x, y in zip(l, a, strict=True)]
    ).mean()


def gmpo(l, d, a, **_):  # noqa: E741
    terms = [torch.clamp(x, max=0.1) if a[0] > 0 else torch.clamp(x, min=-0.15) for x in d]
    return a[0] * torch.stack(terms).mean().exp()


def vespo(l, d, a, **_):  # noqa: E741
    k, c = (2.0, 3.1) if a[0] >= 0 else (2.9, 2.0)
    w = d.sum().exp().detach()
    return w**k * torch.exp(c * (1 - w)) * a[0] * l.sum()


def topr(l, d, a, r, **_):  # noqa: E741
    w = 1.0 if r > 0 else min(float(d.detach().sum().exp()), 1.0)
    return w * a[0] * l.sum()


def rloo(l, d, a, **_):  # noqa: E741
    return ppo(d.sum().exp(), a[0], 0.8, 1.2)


CASES = {
    "geometric_ratio": (gspo, {"epsilon_low": 0.05, "epsilon_high": 0.06}, "mean"),
    "geometric_token_ratio": (gspo_token, {"epsilon_low": 0.05, "epsilon_high": 0.06}, "mean"),
    "clipped_geometric_ratio": (gmpo, {"epsilon_low": 0.15, "epsilon_high": 0.1}, "mean"),
    "sequence_tempered": (vespo, {"positive_decay": 3.1, "negative_power": 2.9}, "sum"),
    "tapered_sequence": (topr, {}, "sum"),
    "clipped_sequence_ratio": (rloo, {}, "sum"),
}


def weights_of(kind):
    """1 / (B T) or 1 / B, over the completions that are not empty."""
    lengths = torch.tensor(LENGTHS, dtype=F64)
    per_completion = 1 / lengths.clamp(min=1) if kind == "mean" else torch.ones(6, dtype=F64)
    return (per_completion / (lengths > 0).sum())[INDEX]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", sorted(CASES))
def test_objective_and_gradient_of_a_loop_over_completions(name, seed):
    formula, settings, kind = CASES[name]
    data = batch(seed)
    if name == "geometric_token_ratio":  # the only one with advantages of tokens
        data["advantages"] = torch.randn(
            INDEX.shape[0], generator=torch.Generator().manual_seed(seed), dtype=F64
        )
    logps = data["logps"].clone().requires_grad_()
    objective = torch.zeros((), dtype=F64)
    for i in range(6):
        mine = i == INDEX
        if mine.any():
            d = logps[mine] - data["old_logps"][mine]
            objective = objective + formula(
                logps[mine], d, data["advantages"][mine], r=data["rewards"][i]
            )
    (objective / 5).backward()
    terms = call(name, data, **settings)
    weights = weights_of(kind)
    assert float((weights * terms.values).sum()) == pytest.approx(
        float(objective.detach()) / 5, rel=1e-12
    )
    torch.testing.assert_close(weights * terms.slopes, logps.grad, rtol=1e-11, atol=1e-13)


def p3o(data, epsilon, joint):
    """Mean over the pairs of the objective, of a loop over prompts."""
    logps = data["logps"].clone().requires_grad_()
    pairs = [[i for i in range(6) if GROUPS[i] == g] for g in range(3)]
    pairs = [pair for pair in pairs if all(LENGTHS[i] for i in pair)]
    total = torch.zeros((), dtype=F64)
    for one, two in pairs:
        sums = [logps[i == INDEX].sum() for i in (one, two)]
        ratios = [
            (s - data["old_logps"][i == INDEX].sum()).exp()
            for s, i in zip(sums, (one, two), strict=True)
        ]
        a = data["rewards"][one] - data["rewards"][two]
        if joint:
            lead = math.log(float((ratios[0] / ratios[1]).detach()))
            gate = not (lead * float(a) > 0 and abs(lead) > 2 * math.log(1 + epsilon))
            total = total + 0.5 * gate * a * (ratios[0] * ratios[1]).detach() * (sums[0] - sums[1])
        else:
            total = total + 0.5 * ppo(ratios[0], a, 1 - epsilon, 1 + epsilon)
            total = total + 0.5 * ppo(ratios[1], -a, 1 - epsilon, 1 + epsilon)
    (total / len(pairs)).backward()
    return total.detach() / len(pairs), logps.grad


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("joint", [False, True])
def test_pairwise_surrogates_are_means_over_pairs(joint, seed):
    data = batch(seed, spread=0.5)
    terms = call("pairwise_jointly_clipped" if joint else "pairwise_clipped", data)
    value, gradient = p3o(data, 0.2, joint)
    weight = 1 / 4  # the completions of both pairs without an empty member
    assert float((weight * terms.values).sum()) == pytest.approx(float(value), rel=1e-12)
    torch.testing.assert_close(weight * terms.slopes, gradient, rtol=1e-11, atol=1e-13)


def test_the_joint_gate_opens_and_closes():
    slopes = [call("pairwise_jointly_clipped", batch(seed, spread=0.5)).slopes for seed in range(6)]
    closed = [bool((s[INDEX == 0] == 0).all()) for s in slopes]
    assert any(closed)
    assert not all(closed)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_golden_values(sign):
    logps = torch.zeros(4, dtype=F64)
    advantages = torch.full((4,), sign, dtype=F64)
    rewards = torch.tensor([sign], dtype=F64)
    arguments = (logps, logps - GOLDEN_D, advantages)
    wide = geometric_ratio(*arguments, ONE, epsilon_low=0.2, epsilon_high=0.2)
    assert wide.values.tolist() == pytest.approx([sign * 1.010050] * 4, abs=1e-6)
    assert (wide.slopes / 4).tolist() == pytest.approx([sign * 0.252513] * 4, abs=1e-6)
    narrow = geometric_ratio(*arguments, ONE)
    value, slope = (1.000400, 0.0) if sign > 0 else (-1.010050, -0.252513)
    assert narrow.values.tolist() == pytest.approx([value] * 4, abs=1e-6)
    assert (narrow.slopes / 4).tolist() == pytest.approx([slope] * 4, abs=1e-6)
    gmpo_terms = clipped_geometric_ratio(*arguments, ONE, epsilon_low=0.015, epsilon_high=0.015)
    value = 1.005013 if sign > 0 else -1.010050
    slopes = [0, 0.251253, 0, 0.251253] if sign > 0 else [-0.252513] * 4
    assert gmpo_terms.values.tolist() == pytest.approx([value] * 4, abs=1e-6)
    assert (gmpo_terms.slopes / 4).tolist() == pytest.approx(slopes, abs=1e-6)
    phi = 0.958455 if sign > 0 else 1.039124
    tempered = sequence_tempered(*arguments, ONE)
    assert tempered.slopes.tolist() == pytest.approx([sign * phi] * 4, abs=1e-6)
    tapered = tapered_sequence(*arguments, rewards, ONE)
    assert tapered.slopes.tolist() == [sign] * 4


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", sorted(CASES))
def test_on_policy_the_slope_is_the_advantage_exactly(name, dtype):
    data = batch(dtype=dtype)
    data["old_logps"] = data["logps"].clone()
    terms = call(name, data)
    assert torch.equal(terms.slopes, data["advantages"])
    assert terms.values.dtype == dtype


def test_on_policy_pairs_learn_from_the_reward_gap():
    data = batch()
    data["old_logps"] = data["logps"].clone()
    gaps = torch.tensor([-1.0, -1.2, 0.0, 1.2, 0.0, 1.0], dtype=F64)[INDEX]
    for name in ("pairwise_clipped", "pairwise_jointly_clipped"):
        torch.testing.assert_close(call(name, data).slopes, gaps, rtol=1e-14, atol=1e-15)


def test_gspo_token_is_gspo_for_a_constant_advantage_and_gmpo_without_clips_too():
    data = batch()
    gspo_terms = call("geometric_ratio", data, epsilon_low=9.0, epsilon_high=9.0)
    token_terms = call("geometric_token_ratio", data, epsilon_low=9.0, epsilon_high=9.0)
    gmpo_terms = call("clipped_geometric_ratio", data, epsilon_low=9.0, epsilon_high=9.0)
    assert torch.equal(gspo_terms.slopes, token_terms.slopes)
    torch.testing.assert_close(gspo_terms.slopes, gmpo_terms.slopes, rtol=1e-13, atol=0)
    assert torch.equal(gspo_terms.slopes != 0, data["advantages"] != 0)


def test_with_one_token_the_geometric_and_the_sequence_ratio_are_ppo():
    logps = torch.tensor([-1.0, -0.7, -1.5, -1.0, -0.7, -1.5], dtype=F64)
    d = torch.tensor([0.0, 0.4, -0.5, 0.0, 0.4, -0.5], dtype=F64)
    advantages = torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=F64)
    arguments = (logps, logps - d, advantages, torch.arange(6))
    slopes = [1.0, 0.0, 0.606531, -1.0, -1.491825, 0.0]
    values = [1.0, 1.28, 0.606531, -1.0, -1.491825, -0.8]
    for function in (geometric_ratio, clipped_sequence_ratio, geometric_token_ratio):
        terms = function(*arguments, epsilon_low=0.2, epsilon_high=0.28)
        assert terms.slopes.tolist() == pytest.approx(slopes, abs=1e-6)
        assert terms.values.tolist() == pytest.approx(values, abs=1e-6)


def test_the_tempered_weight_is_largest_at_its_power_over_its_decay():
    for advantage, peak in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        arguments = torch.zeros(1, dtype=F64), torch.full((1,), advantage, dtype=F64), ONE[:1]
        slopes = {
            w: abs(
                float(
                    sequence_tempered(
                        arguments[0], arguments[0] - math.log(w), *arguments[1:]
                    ).slopes
                )
            )
            for w in (0.9 * peak, peak, 1.1 * peak)
        }
        assert max(slopes, key=slopes.__getitem__) == peak


@pytest.mark.parametrize("name", sorted(SEQUENCE_SURROGATES))
@pytest.mark.parametrize("shift", [-torch.inf, -800.0, 25.0, torch.inf])
def test_extreme_ratios_stay_finite(name, shift):
    data = batch(dtype=torch.float32)
    data["old_logps"] = data["old_logps"] + shift
    terms = call(name, data)
    assert torch.isfinite(terms.values).all()
    assert torch.isfinite(terms.slopes).all()


@pytest.mark.parametrize(
    "name", ["geometric_ratio", "clipped_geometric_ratio", "clipped_sequence_ratio"]
)
def test_past_a_clamp_there_is_no_slope(name):
    data = batch()
    data["old_logps"] = data["logps"] - 21.0
    data["advantages"] = -torch.ones_like(data["logps"])  # where PPO's clip never acts
    assert torch.equal(call(name, data).slopes, torch.zeros_like(data["logps"]))


def test_gspo_stops_at_a_mean_log_ratio_of_ten():
    logps, index = torch.zeros(2, dtype=F64), torch.tensor([0, 0])
    advantages = -torch.ones(2, dtype=F64)
    below = geometric_ratio(logps, logps - 9.9, advantages, index)
    above = geometric_ratio(logps, logps - 10.1, advantages, index)
    assert below.slopes.tolist() == pytest.approx([-math.exp(9.9)] * 2)
    assert above.values.tolist() == pytest.approx([-math.exp(10.0)] * 2)
    assert above.slopes.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", sorted(SEQUENCE_SURROGATES))
def test_completions_do_not_see_each_other_and_no_tokens_are_no_error(name):
    data = batch()
    whole = call(name, data)
    data["logps"] = data["logps"].clone()
    data["logps"][INDEX == 4] = torch.nan
    spoilt = call(name, data)
    for i in (0, 1, 3, 5):
        assert torch.equal(whole.slopes[i == INDEX], spoilt.slopes[i == INDEX])
    per_completion = ("rewards", "groups")
    none = {key: value if key in per_completion else value[:0] for key, value in data.items()}
    assert call(name, none).slopes.shape == (0,)


def test_wrong_shapes_and_groups_are_refused():
    data = batch()
    with pytest.raises(ValueError, match="per trained token"):
        geometric_ratio(data["logps"], data["old_logps"], torch.ones(6, dtype=F64), INDEX)
    with pytest.raises(ValueError, match="per trained token"):
        clipped_sequence_ratio(data["logps"], data["old_logps"][1:], data["advantages"], INDEX)
    groups = torch.zeros(6, dtype=torch.int64)
    for function in (pairwise_clipped, pairwise_jointly_clipped):
        with pytest.raises(ValueError, match="exactly 2"):
            function(data["logps"], data["old_logps"], data["rewards"], groups, INDEX)


def bounds_by_loops(
    logps, old_logps, advantages, target, low=(0.6, 0.8, 0.05), high=(1.2, 2.0, 0.05)
):
    b_low, b_high = low[0], high[0]

    def ratio():
        positive, negative = 0.0, 0.0
        for l, o, a in zip(logps.tolist(), old_logps.tolist(), advantages.tolist(), strict=True):  # noqa: E741
            rho = math.exp(min(max(l - o, -20.0), 20.0))
            eff = a * min(rho, b_high) if a >= 0 else a * max(rho, b_low)
            positive, negative = positive + max(eff, 0.0), negative + max(-eff, 0.0)
        return positive / (negative + 1e-8) if negative else math.inf

    while ratio() < target and b_low < low[1]:
        b_low = min(b_low + low[2], low[1])
    while ratio() < target and b_high < high[1]:
        b_high = min(b_high + high[2], high[1])
    return b_low, b_high


@pytest.mark.parametrize("seed", range(8))
def test_balanced_bounds_are_those_of_the_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    logps = torch.randn(60, generator=generator, dtype=F64)
    old_logps = logps - 0.6 * torch.randn(60, generator=generator, dtype=F64)
    advantages = torch.randn(60, generator=generator, dtype=F64)
    found = []
    for target in (0.0, 0.9, 1.0, 1.03, 1.07, 1.2, 50.0):
        bounds = tuple(map(float, balanced_bounds(logps, old_logps, advantages, target=target)))
        assert bounds == bounds_by_loops(logps, old_logps, advantages, target)
        found.append(bounds)
    assert found[0] == (0.6, 1.2)
    assert found[-1] == (0.8, 2.0)


def test_balanced_bounds_stop_half_way_and_without_negative_tokens():
    logps = torch.tensor([1.0, 0.0], dtype=F64)
    advantages = torch.tensor([1.0, -1.5], dtype=F64)
    bounds = balanced_bounds(logps, torch.zeros(2, dtype=F64), advantages, target=1.0)
    assert tuple(map(float, bounds)) == bounds_by_loops(logps, torch.zeros(2), advantages, 1.0)
    assert 1.2 < float(bounds[1]) < 2.0
    bounds = balanced_bounds(logps, torch.zeros(2, dtype=F64), advantages.abs(), target=9.0)
    assert tuple(map(float, bounds)) == (0.6, 1.2)
    with pytest.raises(ValueError, match="positive step"):
        balanced_bounds(logps, logps, advantages, high_step=0.0)


@pytest.mark.parametrize("name", sorted(SEQUENCE_SURROGATES))
def test_float32_is_kept_and_close_and_inputs_are_not_changed(name):
    exact, data = call(name, batch()), batch(dtype=torch.float32)
    before = {key: value.clone() for key, value in data.items()}
    terms = call(name, data)
    assert terms.values.dtype == terms.slopes.dtype == torch.float32
    torch.testing.assert_close(terms.slopes.double(), exact.slopes, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[key], value) for key, value in data.items())
