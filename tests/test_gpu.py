"""The same claims on an NVIDIA GPU; needs torch, transformers and pytest there, nothing else."""

import dataclasses

import pytest
import torch

from fastrl.advantages import group_relative
from fastrl.aggregation import token_mean
from fastrl.loss import policy_pass_loss
from fastrl.methods import METHODS
from fastrl.methods.coefficients import token_objective
from fastrl.packing import pack, pack_rollouts
from fastrl.rollout import Sampling, make_engine
from fastrl.types import Example, Prompts
from fastrl_kernels import LMHead, linear_logps
from tests.helpers import random_ids, tiny_model, tiny_policy, with_float64_norms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logps_against_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(257, 192, generator=generator).to("cuda", dtype).requires_grad_()
    weight = (0.3 * torch.randn(5003, 192, generator=generator)).to("cuda", dtype).requires_grad_()
    targets = torch.randint(5003, (257,), generator=generator).cuda()
    out = linear_logps(hidden, weight, targets)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(out.logps.double(), exact, rtol=0, atol=1e-4)
    gradients = torch.autograd.grad(out.logps.sum(), (hidden, weight))
    expected = torch.autograd.grad(exact.sum(), (hidden, weight))
    for got, want in zip(gradients, expected, strict=True):
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_packed_equals_one_forward_per_sequence():
    model = with_float64_norms(tiny_model()).cuda()
    prompts = random_ids([7, 3])
    completions = [random_ids([6, 1, 11], seed=1), random_ids([4, 0, 9], seed=2)]
    plan = pack(prompts, completions).to(torch.device("cuda"))
    with plan.attach(model), torch.no_grad():
        hidden = model.model(**plan.inputs).last_hidden_state[0]
    out = linear_logps(hidden[plan.source_index], LMHead.from_model(model), plan.target_ids)
    rows = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    for (prompt, completion), logps in zip(rows, plan.scatter(out.logps), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion])[None].cuda()).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, completion[:, None].cuda())[:, 0]
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-10)


def test_a_step_from_rollouts_to_weights_is_the_same_twice():
    finals = []
    for _ in range(2):
        policy = tiny_policy()
        policy.model.cuda()
        ids = tuple(random_ids([5, 3, 9], vocab_size=250))
        prompts = Prompts(ids, tuple(Example(prompt="x") for _ in ids))
        generator = torch.Generator("cuda").manual_seed(0)
        engine = make_engine("generate", policy)
        rollouts = engine.generate(prompts, Sampling(4, 6), generator)
        rewards = torch.tensor([float(c.sum() % 7) for c in rollouts.completion_ids]).double()
        groups = torch.arange(12) // 4
        passes = pack_rollouts(
            rollouts, torch.ones(12, dtype=torch.bool), group_relative(rewards, groups),
            token_mean(rollouts.lengths), max_tokens_per_pass=40, device=policy.device,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
        for item in passes:
            batch = dataclasses.replace(item.batch, old_logps=None)
            loss = policy_pass_loss(
                policy.hidden_states(item.plan), policy.lm_head, batch,
                objective=token_objective(METHODS["grpo"]), temperature=1.0, entropy_coef=0.0,
            )  # fmt: skip
            loss.loss.backward()
        optimizer.step()
        finals.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    assert torch.isfinite(finals[0]).all()
    assert torch.equal(finals[0], finals[1])
