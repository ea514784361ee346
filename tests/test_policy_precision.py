"""In what dtype weights, layers and the head are, in sampling and in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl.config import ModelConfig
from fastrl.packing import pack
from fastrl.policy import Policy, load_policy, new_policy
from fastrl.precision import PRECISIONS, head_in_float32
from fastrl.rollout import Sampling, make_engine
from fastrl.rollout_causes import is_half
from fastrl_kernels import LMHead, linear_logps
from tests.helpers import TEXTS, TINY, random_ids, tiny_policy
from tests.helpers_engines import generator, prompts_of

WIDE = {"model_type": "qwen3", "vocab_size": 300, **TINY, "hidden_size": 64}
HALF = ("split", "stochastic")


def policy_of(precision: str, **fields) -> Policy:
    architecture = {**WIDE, **fields.pop("architecture", {})}
    return new_policy(
        ModelConfig(architecture=architecture, precision=precision, **fields), TEXTS, seed=0
    )


def plan_of():
    return pack(random_ids([5, 3]), [random_ids([4, 2], seed=1), random_ids([6, 1], seed=2)])


def logps_of(policy: Policy) -> Tensor:
    plan = plan_of()
    hidden = policy.hidden_states(plan)[plan.source_index]
    return linear_logps(hidden, policy.lm_head, plan.target_ids).logps


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dtypes_of_weights_and_gradients(precision):
    policy = policy_of(precision)
    expected = torch.bfloat16 if precision in HALF else torch.float32
    logps_of(policy).sum().backward()
    for name, parameter in policy.model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == expected, name
    assert all(x.dtype != torch.bfloat16 for x in policy.model.buffers())  # tables of angles
    assert policy.bf16 == (precision == "autocast")
    assert policy.is_half == (precision != "float32")
    assert policy.has_bf16_stream == (precision in HALF)
    assert is_half(policy) == policy.is_half
    num_bytes = sum(x.nbytes for x in policy.model.parameters())
    assert num_bytes == policy.num_parameters * (2 if precision in HALF else 4)


@pytest.mark.parametrize("precision", ["autocast", *HALF])
def test_half_precision_is_float32_up_to_rounding(precision):
    exact, rounded = logps_of(policy_of("float32")), logps_of(policy_of(precision))
    assert rounded.dtype == torch.float32
    assert 1e-5 < (exact - rounded).abs().max() < 5e-2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_rounded_once_and_loaded_to_the_bit(tmp_path, precision):
    policy = policy_of(precision)
    for parameter, exact in zip(
        policy.model.parameters(), policy_of("float32").model.parameters(), strict=True
    ):
        assert torch.equal(parameter, exact.to(parameter.dtype))
    policy.save(tmp_path)
    loaded = load_policy(ModelConfig(precision=precision), tmp_path)
    pairs = zip(policy.model.parameters(), loaded.model.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_head_in_float32_takes_no_rounded_inputs(precision, tie):
    """Its log-probabilities are those of float64 arithmetic on the same states and weights."""
    architecture = {"tie_word_embeddings": tie}
    policy = policy_of(precision, cast_lm_head_to_fp32=True, architecture=architecture)
    plan = plan_of()
    assert policy.head_dtype == torch.float32
    hidden = policy.hidden_states(plan)[plan.source_index]
    assert hidden.dtype == policy.lm_head.weight.dtype == torch.float32
    hidden.retain_grad()
    out = linear_logps(hidden, policy.lm_head, plan.target_ids)
    weight = policy.model.lm_head.weight.detach().double().requires_grad_()
    states = hidden.detach().double().requires_grad_()
    exact = (states @ weight.T).log_softmax(-1).gather(1, plan.target_ids[:, None])[:, 0]
    torch.testing.assert_close(out.logps.double(), exact, rtol=0, atol=1e-5)
    out.logps.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(hidden.grad.double(), states.grad, rtol=1e-5, atol=1e-6)
    if not tie:  # a tied weight has the gradient of the embedding too
        found = policy.model.lm_head.weight.grad
        assert found.dtype == policy.model.lm_head.weight.dtype
        rounding = torch.finfo(found.dtype).eps
        torch.testing.assert_close(found.double(), weight.grad, rtol=rounding, atol=1e-5)


def test_gradients_of_a_half_precision_head_are_what_the_cast_improves():
    """Statistics do not gain: they come from float32 sums of bfloat16 inputs already."""
    hidden = torch.randn(40, 64, generator=generator(1)).bfloat16()
    weight = torch.randn(300, 64, generator=generator(2)).bfloat16() / 8
    targets = torch.arange(40)
    gaps = {}
    for cast in (False, True):
        states, head = hidden.clone().requires_grad_(), LMHead(weight.clone().requires_grad_())
        used = head_in_float32(head) if cast else head
        out = linear_logps(states.to(used.weight.dtype), used, targets)
        out.logps.sum().backward()
        exact = hidden.double().requires_grad_()
        logps = (exact @ weight.double().T).log_softmax(-1)[range(40), targets]
        logps.sum().backward()
        torch.testing.assert_close(out.logps.double(), logps, rtol=0, atol=1e-5)
        gaps[cast] = (states.grad.double() - exact.grad).abs().mean()
    assert gaps[True] <= gaps[False]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("precision", ["float32", *HALF])
def test_sampler_and_trainer_share_precision_and_head(precision, cast):
    """The engine decodes one token at a time, so layers in half precision may round otherwise."""
    policy = policy_of(precision, cast_lm_head_to_fp32=cast)
    prompts = prompts_of([6, 3])
    engine = make_engine("native", policy)
    rollouts = engine.generate(prompts, Sampling(3, 7), generator())
    ids = rollouts.completion_ids
    plan = pack(list(prompts.token_ids), [ids[:3], ids[3:]])
    with torch.no_grad():
        hidden = policy.hidden_states(plan)[plan.source_index]
        logps = linear_logps(hidden, policy.lm_head, plan.target_ids).logps
    gap = (logps - torch.cat(rollouts.rollout_logps)).abs().max()
    assert gap < (2e-5 if precision == "float32" else 3e-2)
    assert not [x for x in (engine.__dict__ | policy.__dict__).values() if isinstance(x, Tensor)]


def test_layers_of_bf16_weights_run_without_autocast(monkeypatch):
    policy = policy_of("split")
    seen = []
    forward = policy.model.model.layers[0].mlp.up_proj.forward
    monkeypatch.setattr(
        policy.model.model.layers[0].mlp.up_proj, "forward",
        lambda x: (seen.append((x.dtype, torch.is_autocast_enabled("cpu"))), forward(x))[1],
    )  # fmt: skip
    logps_of(policy)
    assert seen
    assert set(seen) == {(torch.bfloat16, False)}


def test_a_copy_keeps_precision_and_cast():
    policy = tiny_policy()
    policy.bf16, policy.cast_lm_head_to_fp32 = True, True
    copied = policy.frozen_copy()
    assert (copied.bf16, copied.cast_lm_head_to_fp32) == (True, True)
