"""The loss of a step is one number however it is cut into passes, ordered or packed."""

from __future__ import annotations

import pytest
import torch

from fastrl.aggregation import AGGREGATIONS
from fastrl.loss import policy_pass_loss
from fastrl.methods import METHODS
from fastrl.methods.coefficients import completion_weights, token_objective
from fastrl.methods.record import Method, use
from fastrl.packing import PackedPass, pack, pack_rollouts
from fastrl.phases import start_inputs
from fastrl.selection import with_gradient
from fastrl.types import Batch, Rewards
from fastrl_kernels import LMHead
from tests.helpers import random_rollouts, tiny_model, with_float64_norms

PROMPTS = [5, 9, 2]
COMPLETIONS = [[4, 7, 1, 6], [3, 12, 5, 2], [8, 1, 1, 3]]
CPU = torch.device("cpu")


def step_gradient(model, passes: list[PackedPass], *, entropy_coef=0.0, method="grpo"):
    model.zero_grad()
    total = 0.0
    for item in passes:
        with item.plan.attach(model):
            hidden = model.model(**item.plan.inputs).last_hidden_state[0]
        loss = policy_pass_loss(
            hidden, LMHead.from_model(model), item.batch,
            objective=token_objective(METHODS[method]), temperature=0.9, entropy_coef=entropy_coef,
        ).loss  # fmt: skip
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def completion_weights_of(aggregation, rollouts):
    rewards = Rewards(torch.zeros(len(rollouts.completion_ids)), {})
    inputs = start_inputs(
        rollouts, rewards, rollouts.lengths, max_completion_length=12, progress=0.0
    )
    return completion_weights(Method("", "", "", aggregation=use(aggregation)), inputs)


def one_row_each(rollouts, advantages, weights) -> list[PackedPass]:
    """No sharing at all: every completion is a pass of its own."""
    G = rollouts.num_generations
    passes = []
    for b, completion in enumerate(rollouts.completion_ids):
        plan = pack([rollouts.prompts.token_ids[b // G]], [[completion]])
        row = torch.full_like(plan.completion_index, b)
        passes.append(
            PackedPass(
                plan,
                Batch(
                    plan.input_ids, plan.position_ids, plan.segments, plan.source_index,
                    plan.target_ids, row, advantages[row], weights[row],
                ),
            )
        )  # fmt: skip
    return passes


@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
def test_any_packing_gives_the_same_gradient(aggregation):
    model = with_float64_norms(tiny_model())
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    generator = torch.Generator().manual_seed(3)
    advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    weights = completion_weights_of(aggregation, rollouts)

    def packed(budget):
        kept = torch.ones(12, dtype=torch.bool)
        return pack_rollouts(
            rollouts, kept, advantages, weights,
            max_tokens_per_pass=budget, device=CPU, dtype=torch.float64,
        )  # fmt: skip

    whole = packed(1000)
    assert len(whole) == 1
    loss, expected = step_gradient(model, whole, entropy_coef=0.01)
    many = packed(22)
    assert len(many) >= 4
    for passes in (many, packed(40), many[::-1], one_row_each(rollouts, advantages, weights)):
        other_loss, gradients = step_gradient(model, passes, entropy_coef=0.01)
        assert other_loss == pytest.approx(loss, abs=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)


def test_rows_without_advantage_may_be_left_out():
    model = with_float64_norms(tiny_model())
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    advantages = torch.tensor([1.0, -1, 0, 0, 0, 0, 0, 0, 0.5, 0, -0.5, 0], dtype=torch.float64)
    weights = completion_weights_of("token_mean", rollouts)
    results = []
    for kept in (
        torch.ones(12, dtype=torch.bool),
        with_gradient(advantages, rollouts.lengths, has_penalty=False),
    ):
        passes = pack_rollouts(
            rollouts, kept, advantages, weights,
            max_tokens_per_pass=1000, device=CPU, dtype=torch.float64,
        )  # fmt: skip
        results.append((sum(len(p.plan.input_ids) for p in passes), step_gradient(model, passes)))
    (all_tokens, (loss, expected)), (few_tokens, (same_loss, gradients)) = results
    assert few_tokens < all_tokens
    assert same_loss == pytest.approx(loss, abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)


def test_gradient_is_that_of_the_written_out_loss():
    """Token-mean GRPO on stock log-probabilities with autograd through ratio, clip and minimum."""
    model = with_float64_norms(tiny_model())
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    generator = torch.Generator().manual_seed(4)
    advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    weights = completion_weights_of("token_mean", rollouts)
    kept = torch.ones(12, dtype=torch.bool)
    (item,) = pack_rollouts(
        rollouts, kept, advantages, weights,
        max_tokens_per_pass=1000, device=CPU, dtype=torch.float64,
    )  # fmt: skip
    noise = 0.3 * torch.randn(int(rollouts.lengths.sum()), generator=generator, dtype=torch.float64)

    model.zero_grad()
    losses, old = [], []
    for b, completion in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompts.token_ids[b // 4]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        logps = (logits[len(prompt) - 1 : -1] / 0.9).log_softmax(-1)
        logps = logps.gather(1, completion[:, None])[:, 0]
        first = sum(len(c) for c in rollouts.completion_ids[:b])
        old.append(logps.detach() + noise[first : first + len(completion)])
        ratio = (logps - old[-1]).exp()
        losses.append(-torch.minimum(ratio * advantages[b], ratio.clamp(0.8, 1.2) * advantages[b]))
    expected_loss = torch.cat(losses).mean()
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    batch = Batch(**{**item.batch.__dict__, "old_logps": torch.cat(old)})
    loss, gradients = step_gradient(model, [PackedPass(item.plan, batch)])
    assert loss == pytest.approx(float(expected_loss.detach()), abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)
