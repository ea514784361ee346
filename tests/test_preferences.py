"""Which pairs are made, and from tokens through pairs and groups back to slopes of tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastrl.preferences import (
    LOSSES,
    PAIRINGS,
    PreferenceInputs,
    PreferenceLoss,
    preference_terms,
)

F64 = torch.float64
REWARDS = torch.tensor([0.5, 1.0, 0.5, 0.0, 1.0, 0.2, 0.7, 0.1, 0.3], dtype=F64)
GROUPS = torch.tensor([3, 0, 3, 0, 3, 1, 3, 0, 1])  # no prompt 2
LENGTHS = torch.tensor([2, 3, 4, 0, 1, 2, 5, 6, 3])  # completion 3 is empty
INDEX = torch.repeat_interleave(torch.arange(9), LENGTHS)


def batch(seed=0, dtype=F64, **changes):
    generator = torch.Generator().manual_seed(seed)

    def tokens():
        return torch.randn(INDEX.shape[0], generator=generator, dtype=F64)

    logps = -tokens().abs()
    vectors = {
        "logps": logps.to(dtype),
        "completion_index": INDEX,
        "lengths": LENGTHS,
        "groups": GROUPS,
        "rewards": REWARDS,
        "ref_logps": (logps + 0.5 * tokens()).to(dtype),
        "old_logps": (logps + 0.5 * tokens()).to(dtype),
        "advantages": tokens().to(dtype),
        "sum_p2": torch.rand(INDEX.shape[0], generator=generator, dtype=F64).to(dtype),
        "from_reference": torch.rand(9, generator=generator) < 0.5,
        "companions": torch.tensor([0, 0, 1, 0, 0, 0, 0, 1, 1], dtype=torch.bool),
    }
    return PreferenceInputs(**(vectors | changes))


def pairs_of(name, rewards=REWARDS, groups=GROUPS, lengths=LENGTHS):
    return PAIRINGS[name](rewards, groups, lengths).tolist()


def test_pairs():
    assert pairs_of("best_worst") == [[1, 7], [8, 5], [4, 0]]
    assert pairs_of("all_pairs") == [
        [1, 7], [8, 5], [4, 0], [4, 2], [4, 6], [6, 0], [6, 2],
    ]  # fmt: skip
    assert pairs_of("every_two") == [
        [1, 7], [5, 8], [0, 2], [0, 4], [0, 6], [2, 4], [2, 6], [4, 6],
    ]  # fmt: skip
    assert pairs_of("adjacent") == [[5, 8], [0, 2], [4, 6]]  # completion 1's partner is empty


@pytest.mark.parametrize("seed", range(5))
def test_pairs_of_random_batches_are_those_of_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 5, (23,), generator=generator)
    lengths = torch.randint(0, 4, (23,), generator=generator)
    rewards = torch.randint(0, 3, (23,), generator=generator).to(F64)
    best, every, ordered = [], [], []
    for prompt in range(5):
        mine = [i for i in range(23) if groups[i] == prompt and lengths[i] > 0]
        every += [[i, j] for i, j in itertools.combinations(mine, 2)]
        ordered += [[i, j] for i, j in itertools.product(mine, mine) if rewards[i] > rewards[j]]
        top = max(mine, key=lambda i: (rewards[i], -i), default=None)
        bottom = min(mine, key=lambda i: (rewards[i], i), default=None)
        if top is not None and rewards[top] > rewards[bottom]:
            best.append([top, bottom])
    assert pairs_of("best_worst", rewards, groups, lengths) == best
    assert pairs_of("every_two", rewards, groups, lengths) == every
    assert pairs_of("all_pairs", rewards, groups, lengths) == ordered


@pytest.mark.parametrize("name", sorted(PAIRINGS))
def test_nothing_to_pair(name):
    nothing = PAIRINGS[name](REWARDS, GROUPS, torch.zeros_like(LENGTHS))
    assert nothing.shape == (0, 2)
    assert nothing.dtype == torch.int64
    alone = PAIRINGS[name](REWARDS[:4], torch.arange(4), torch.ones(4, dtype=torch.int64))
    assert alone.shape == (0, 2)
    empty = PAIRINGS[name](REWARDS[:0], GROUPS[:0], LENGTHS[:0])
    assert empty.shape == (0, 2)


def test_ties_make_no_pair_and_nan_is_refused():
    for name in ("best_worst", "all_pairs"):
        assert pairs_of(name, rewards=torch.ones(9, dtype=F64)) == []
        with pytest.raises(ValueError, match="NaN"):
            pairs_of(name, rewards=REWARDS * torch.nan)
        assert pairs_of(name, torch.tensor([0.0, -torch.inf]), torch.zeros(2, dtype=torch.int64),
                        torch.ones(2, dtype=torch.int64)) == [[0, 1]]  # fmt: skip


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def gradient(formula, inputs):
    """Loss and gradient of a function of the log-probabilities of the tokens."""
    logps = inputs.logps.double().clone().requires_grad_()
    loss = formula(logps)
    loss.backward()
    return float(loss.detach()), logps.grad


def check(terms, inputs, formula, rtol=1e-11):
    loss, slopes = gradient(formula, inputs)
    assert float(terms.loss) == pytest.approx(loss, rel=rtol)
    torch.testing.assert_close(terms.slopes.double(), slopes, rtol=rtol, atol=1e-13)


def test_dpo_from_tokens():
    inputs = batch()

    def formula(logps):
        delta = logps - inputs.ref_logps
        sums = [delta[i == INDEX].sum() for i in range(9)]
        return torch.stack([-log_sigmoid(0.1 * (sums[w] - sums[b])) for w, b in pairs]).mean()

    pairs = pairs_of("best_worst")
    check(preference_terms(LOSSES["dpo"], inputs), inputs, formula)
    pairs = pairs_of("all_pairs")  # where a completion is in several pairs
    terms = preference_terms(LOSSES["dpo"], inputs, pairing=PAIRINGS["all_pairs"])
    check(terms, inputs, formula)


def test_simpo_from_tokens_with_another_beta():
    inputs = batch(1)

    def formula(logps):
        means = [logps[i == INDEX].mean() for i in range(9)]
        losses = [
            -log_sigmoid(3.0 * (means[w] - means[b]) - 0.2) for w, b in pairs_of("best_worst")
        ]
        return torch.stack(losses).mean()

    settings = {"beta": 3.0, "margin": 0.2}
    check(preference_terms(LOSSES["simpo"], inputs, hyper_parameters=settings), inputs, formula)


def test_wpo_takes_its_weights_from_the_tokens():
    inputs = batch(2)
    aligned = [
        (inputs.logps - inputs.sum_p2.log())[i == INDEX].mean() if LENGTHS[i] else 0
        for i in range(9)
    ]

    def formula(logps):
        delta = logps - inputs.ref_logps
        losses = []
        for w, b in pairs_of("best_worst"):
            weight = (aligned[w] + aligned[b]).exp().clamp(max=1.0)
            gap = delta[w == INDEX].sum() - delta[b == INDEX].sum()
            losses.append(-weight * log_sigmoid(0.01 * gap))
        return torch.stack(losses).mean()

    check(preference_terms(LOSSES["weighted_dpo"], inputs), inputs, formula)


def test_companions_are_in_no_pair_and_have_slopes():
    inputs = batch(3)  # completions 2, 7 and 8 are companions, 1 and 5 are left alone

    def formula(logps):
        sums = [logps[i == INDEX].sum() for i in range(9)]
        return torch.relu(1.0 - sums[4] + sums[0]) - 0.01 * sums[2]

    terms = preference_terms(LOSSES["slic"], inputs)
    check(terms, inputs, formula)
    assert terms.slopes[INDEX == 2].unique().tolist() == [-0.01]


def test_a_group_loss_from_tokens():
    inputs = batch(4)

    def formula(logps):
        delta = logps - inputs.ref_logps
        losses = []
        for i in range(9):
            mine = i == INDEX
            if mine.any():
                losses.append((1e-3 * delta[mine].sum() - inputs.advantages[mine][0]) ** 2)
        return torch.stack(losses).mean()

    terms = preference_terms(LOSSES["optimal_advantage_regression"], inputs)
    check(terms, inputs, formula)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_length_desensitized_dpo_from_tokens(alpha):
    inputs = batch(5)

    def formula(logps):
        delta = logps - inputs.ref_logps
        losses = []
        for w, b in pairs_of("all_pairs"):
            shorter = int(min(LENGTHS[w], LENGTHS[b]))
            score = [
                d[:shorter].sum() + alpha * d[shorter:].sum()
                for d in (delta[w == INDEX], delta[b == INDEX])
            ]
            losses.append(-log_sigmoid(0.1 * (score[0] - score[1])))
        return torch.stack(losses).mean()

    loss, settings = LOSSES["length_desensitized_dpo"], {"alpha": alpha}
    terms = preference_terms(loss, inputs, pairing=PAIRINGS["all_pairs"], hyper_parameters=settings)
    check(terms, inputs, formula)
    if alpha == 1.0:
        dpo = preference_terms(LOSSES["dpo"], inputs, pairing=PAIRINGS["all_pairs"])
        torch.testing.assert_close(terms.slopes, dpo.slopes, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_runs_on_tokens_and_keeps_float32(name):
    exact, terms = (
        preference_terms(LOSSES[name], batch(6, dtype)) for dtype in (F64, torch.float32)
    )
    assert terms.slopes.dtype == terms.loss.dtype == torch.float32
    assert exact.slopes.any()
    torch.testing.assert_close(terms.slopes.double(), exact.slopes, rtol=1e-4, atol=1e-5)
    again = preference_terms(LOSSES[name], batch(6, torch.float32))
    assert torch.equal(terms.slopes, again.slopes)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_without_a_single_token_the_loss_is_zero(name):
    vectors = {field: getattr(batch(), field) for field in PreferenceInputs.__dataclass_fields__}
    per_token = ("logps", "completion_index", "ref_logps", "old_logps", "advantages", "sum_p2")
    vectors |= {field: vectors[field][:0] for field in per_token}
    terms = preference_terms(
        LOSSES[name], PreferenceInputs(**vectors | {"lengths": torch.zeros_like(LENGTHS)})
    )
    assert float(terms.loss) == 0.0
    assert terms.slopes.shape == (0,)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_left_out_completion_may_hold_anything(name):
    lengths = LENGTHS.clone()
    lengths[1] = 0
    spoilt = batch(7).logps.clone()
    spoilt[INDEX == 1] = torch.nan
    clean = preference_terms(LOSSES[name], batch(7, lengths=lengths))
    terms = preference_terms(LOSSES[name], batch(7, lengths=lengths, logps=spoilt))
    assert torch.equal(clean.slopes, terms.slopes)
    assert not terms.slopes[INDEX == 1].any()


def test_the_record_says_what_a_loss_needs():
    assert LOSSES["dpo"].needs_reference
    assert not LOSSES["simpo"].needs_reference
    assert LOSSES["slic"].needs_companions
    assert not LOSSES["dpo"].needs_companions
    assert LOSSES["orpo"].inputs == {"logps", "lengths"}
    assert LOSSES["inpo"].inputs == {"logps", "ref_logps", "old_logps"}
    assert LOSSES["weighted_dpo"].inputs == {"logps", "ref_logps", "alignments"}
    assert LOSSES["group_variance"].inputs == {
        "logps", "old_logps", "rewards", "groups", "lengths",
    }  # fmt: skip
    for name, loss in LOSSES.items():
        assert loss.function.__name__ == name
        assert (loss.level == "group") == (loss.pairing is None)


@pytest.mark.parametrize(
    ("name", "missing", "hint"),
    [
        ("dpo", "ref_logps", "frozen reference"),
        ("rebel", "old_logps", "start of the update"),
        ("weighted_dpo", "sum_p2", "linear_logps"),
        ("slic", "companions", "third completion"),
        ("exploratory_dpo", "from_reference", "reference model sampled"),
        ("optimal_advantage_regression", "advantages", "estimator"),
        ("length_desensitized_dpo", "ref_logps", "frozen reference"),
    ],
)
def test_a_missing_input_is_named_with_the_way_to_get_it(name, missing, hint):
    with pytest.raises(ValueError, match=hint):
        preference_terms(LOSSES[name], batch(**{missing: None}))


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="per trained token"):
        batch(ref_logps=torch.zeros(3))
    with pytest.raises(ValueError, match="per completion"):
        batch(rewards=REWARDS[:4])
    with pytest.raises(ValueError, match="every completion"):
        batch(lengths=LENGTHS + 1)
    with pytest.raises(ValueError, match="one companion for every prompt, got 0 to 0"):
        preference_terms(LOSSES["slic"], batch(companions=torch.zeros(9, dtype=torch.bool)))
    with pytest.raises(ValueError, match="leave pairing out"):
        preference_terms(LOSSES["kto"], batch(), pairing=PAIRINGS["all_pairs"])


def absolute_gap(chosen_logps, rejected_logps):
    """A loss of one's own."""
    gaps = chosen_logps - rejected_logps
    return LOSSES["dpo"].function(chosen_logps, rejected_logps, 0 * gaps, 0 * gaps)


def test_a_loss_of_ones_own_is_a_record():
    loss = PreferenceLoss(absolute_gap, "pair", PAIRINGS["adjacent"])
    terms = preference_terms(loss, batch())
    reference = preference_terms(
        LOSSES["dpo"],
        batch(ref_logps=torch.zeros_like(batch().logps)),
        pairing=PAIRINGS["adjacent"],
    )
    assert torch.equal(terms.slopes, reference.slopes)
