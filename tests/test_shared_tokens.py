"""Trained tokens that sequences share: one row at the head each, or two for a clipped loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl.merged_tokens import merge_shared_tokens, merges_exactly
from fastrl.packing import distinct_rows, pack_tree
from fastrl_kernels import linear_logps, policy_loss
from fastrl_kernels.objectives import SURROGATES, Objective, Regulariser, clipped_ratio, k3
from tests.helpers import random_ids

D, V = 7, 61
CLIP = Objective(clipped_ratio, (0.2, 0.28))


def shared_plan():
    """Eight paths of a tree of depth three; every token of the shared parts is trained for each."""
    question, *branches = random_ids([6, 5, 4, 3, 2, 5, 3, 4, 2])
    paths = [[*branches[:1], tail] for tail in branches[2:6]] + [
        [*branches[1:2], tail] for tail in branches[5:9]
    ]
    sequences = [torch.cat([question, *path]) for path in paths]
    return pack_tree(sequences)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_distinct_rows_are_those_of_a_dictionary():
    plan = shared_plan()
    rows = distinct_rows(plan.source_index, plan.target_ids)
    pairs = list(zip(plan.source_index.tolist(), plan.target_ids.tolist(), strict=True))
    distinct = sorted(set(pairs))
    assert len(distinct) < len(pairs) / 2
    assert list(zip(rows.source_index.tolist(), rows.target_ids.tolist(), strict=True)) == distinct
    assert [distinct[row] for row in rows.index.tolist()] == pairs
    assert rows.counts.tolist() == [pairs.count(pair) for pair in distinct]
    values = normal(len(pairs))
    sums = [sum(v for v, p in zip(values.tolist(), pairs, strict=True) if p == pair)
            for pair in distinct]  # fmt: skip
    assert rows.total(values).tolist() == sums  # one after another, in the caller's order
    assert rows.first(values).tolist() == [values[pairs.index(pair)] for pair in distinct]
    alone = distinct_rows(plan.source_index[:1], plan.target_ids[:1])
    assert (alone.index.tolist(), alone.counts.tolist()) == ([0], [1])


def test_a_head_run_once_per_distinct_row_gives_every_sequence_its_own_loss():
    """Log-probabilities and gradients of one row at the head for every token of every sequence."""
    plan = shared_plan()
    weights = normal(len(plan.target_ids), seed=1)
    leaves = [normal(len(plan.input_ids), D), normal(V, D, seed=2)]

    def run(is_distinct: bool) -> tuple[Tensor, ...]:
        hidden, head = (leaf.clone().requires_grad_() for leaf in leaves)
        if is_distinct:
            rows = plan.distinct_rows()
            out = linear_logps(hidden[rows.source_index], head, rows.target_ids)
            logps = rows.spread(out.logps)
        else:
            logps = linear_logps(hidden[plan.source_index], head, plan.target_ids).logps
        (weights * logps).sum().backward()
        assert hidden.grad is not None
        assert head.grad is not None
        return logps.detach(), hidden.grad, head.grad

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def clipped_case(seed: int = 3) -> dict[str, Tensor]:
    """Hidden states, head, and constants of a loss: advantages of both signs on every shared token.

    Old log-probabilities are those of another policy, so that ratios lie on all sides of the clips.
    """
    plan = shared_plan()
    num_sequences = len(plan.completion_lengths)
    hidden, head = normal(len(plan.input_ids), D, seed=seed), normal(V, D, seed=seed + 1)
    rows = distinct_rows(plan.source_index, plan.target_ids)
    other = head + 0.1 * normal(V, D, seed=seed + 2)
    old = rows.spread(linear_logps(hidden[rows.source_index], other, rows.target_ids).logps)
    return {
        "hidden": hidden,
        "head": head,
        "old_logps": old,
        "advantages": normal(num_sequences, seed=seed + 3)[plan.completion_index],
        "token_weights": normal(num_sequences, seed=seed + 4).abs()[plan.completion_index],
    }


def loss_of(
    case: dict[str, Tensor], source_index: Tensor, target_ids: Tensor, objective: Objective,
    advantages: Tensor, token_weights: Tensor, **constants: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and gradients of hidden states and head."""
    hidden, head = (case[name].clone().requires_grad_() for name in ("hidden", "head"))
    out = policy_loss(
        hidden[source_index], head, target_ids, advantages, token_weights, objective=objective,
        entropy_coef=0.01, **constants,
    )  # fmt: skip
    out.loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return out.loss.detach(), hidden.grad, head.grad


@pytest.mark.parametrize(
    "name",
    [
        "clipped_ratio",
        "dual_clipped_ratio",
        "two_sided_clipped_ratio",
        "truncated_importance",
        "soft_gated_ratio",
    ],
)
def test_merged_tokens_have_the_same_loss_and_gradient(name):
    hyper_parameters = {
        "clipped_ratio": (0.2, 0.28),
        "dual_clipped_ratio": (0.2, 0.28, 3.0),
        "two_sided_clipped_ratio": (0.2, 0.28, 4.0),
        "truncated_importance": (0.2, 0.28),
        "soft_gated_ratio": (1.0, 1.05),
    }[name]
    objective = Objective(SURROGATES[name], hyper_parameters, (Regulariser(k3, 0.04),))
    plan, case = shared_plan(), clipped_case()
    constants = {"advantages": case["advantages"], "token_weights": case["token_weights"]}
    constants["advantages"][plan.completion_index == 2] = 0.0
    constants["token_weights"][plan.completion_index == 3] = 0.0
    old, ref = case["old_logps"], case["old_logps"] - 0.3
    kept = normal(len(old), seed=9).abs()
    merged = merge_shared_tokens(
        plan, **constants, objective=objective, old_logps=old, ref_logps=ref, rollout_weights=kept
    )
    rows = merged.rows
    distinct = distinct_rows(plan.source_index, plan.target_ids)
    assert len(distinct.counts) < len(rows.counts) <= 2 * len(distinct.counts)
    found = loss_of(
        case, rows.source_index, rows.target_ids, objective, merged.advantages,
        merged.token_weights, old_logps=merged.old_logps, ref_logps=merged.ref_logps,
    )  # fmt: skip
    expected = loss_of(
        case, plan.source_index, plan.target_ids, objective, *constants.values(), old_logps=old,
        ref_logps=ref, rollout_weights=kept,
    )  # fmt: skip
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-12 * max(1.0, truth.abs().max()))


def test_one_row_with_the_sum_of_both_signs_is_wrong():
    """What merging must not do: the clip of one sign decides on the gradient of the other."""
    plan, case = shared_plan(), clipped_case()
    constants = case["advantages"], case["token_weights"]
    rows = distinct_rows(plan.source_index, plan.target_ids)
    weights = rows.total(constants[1])
    naive = loss_of(
        case, rows.source_index, rows.target_ids, CLIP, rows.total(constants[0] * constants[1])
        / weights, weights, old_logps=rows.first(case["old_logps"]),
    )  # fmt: skip
    expected = loss_of(
        case, plan.source_index, plan.target_ids, CLIP, *constants, old_logps=case["old_logps"]
    )
    for value, truth in zip(naive, expected, strict=True):
        assert (value - truth).abs().max() > 0.01 * truth.abs().max()


def test_surrogates_that_merge_exactly():
    """Said by hand, from the formulas, for every surrogate with numbers for hyper-parameters."""
    refused = {"log_likelihood", "kl_penalised_ratio", "mirror_descent", "drift", "negative_aware"}
    numbers = {
        "clipped_ratio": (0.2, 0.2), "dual_clipped_ratio": (0.2, 0.2, 3.0),
        "bounded_ratio": (0.8, 1.2, 3.0), "two_sided_clipped_ratio": (0.2, 0.2, 4.0),
        "masked_ratio": (0.5, 5.0), "one_sided_masked_ratio": (0.5, 5.0),
        "probability_masked_ratio": (0.2, 0.2), "truncated_importance": (0.2, 0.2),
        "tapered": (1.0,), "soft_gated_ratio": (1.0, 1.05), "quadratic_ratio": (0.2,),
        "kl_penalised_ratio": (0.1,), "mirror_descent": (0.5,), "drift": (2.0, 0.6),
        "shaped_probability": (0.1,), "shaped_probability_ratio": (0.1,), "negative_aware": (0.4,),
    }  # fmt: skip
    for name, surrogate in SURROGATES.items():
        objective = Objective(surrogate, numbers.get(name, ()))
        assert merges_exactly(objective) == (name not in refused), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": Objective(SURROGATES["kl_penalised_ratio"], (0.1,))}, "kl_penalised_ratio"),
        ({"objective": CLIP._replace(hyper_parameters=(torch.full((9,), 0.2), 0.2))}, "per token"),
        ({"token_weights": "negative"}, "token_weights of zero or more"),
        ({"rollout_weights": "negative"}, "rollout_weights of zero or more"),
        ({"old_logps": "different"}, "the same old_logps"),
        ({"ref_logps": "different"}, "the same ref_logps"),
        ({"advantages": "short"}, "one value per trained token"),
    ],
)
def test_what_would_not_be_exact_is_refused(changes, message):
    plan, case = shared_plan(), clipped_case()
    values = {
        "negative": -case["token_weights"],
        "different": normal(len(plan.target_ids)),
        "short": case["advantages"][:-1],
    }
    arguments = {name: case[name] for name in ("advantages", "token_weights", "old_logps")}
    arguments |= {"objective": CLIP} | {
        name: values[value] if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        merge_shared_tokens(plan, **arguments)
    with pytest.raises(ValueError, match="one value per distinct row"):
        distinct_rows(plan.source_index, plan.target_ids).spread(case["old_logps"])
