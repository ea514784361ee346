"""Losses at the head at real sizes, against chunked float64; offsets beyond 2^31; bits.

See gpu_sizes.py for a rehearsal on the CPU. S tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))  # the float64 truth

from inputs import Shape, make_inputs
from reference import Outputs, compare, policy_reference, row_statistics, with_gradients

from fastrl_kernels import linear_logps, policy_loss, selected_logps, token_loss
from fastrl_kernels.adamw import Keys, Moments, Rates, adamw_step
from fastrl_kernels.objectives import Objective, Regulariser, clipped_ratio, k3
from fastrl_kernels.token_loss import token_loss_reference
from tests.kernels.gpu_sizes import (
    DEVICE,
    MARKS,
    assert_same_on_every_run,
    make_generator,
    relative_error,
    sized,
)

pytestmark = MARKS
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GRPO = Objective(clipped_ratio, (0.2, 0.28))
TOLERANCES = {
    BF16: {"loss": 1e-4, "logps": 1e-3, "hidden_grad": 1e-2, "weight_grad": 1e-2},
    FP16: {"loss": 1e-4, "logps": 1e-3, "hidden_grad": 2e-3, "weight_grad": 2e-3},
    FP32: {"loss": 1e-5, "logps": 1e-4, "hidden_grad": 1e-4, "weight_grad": 1e-4},
}
# S, V, D of Qwen3's and Gemma3's heads; the rehearsal's are as ragged.
QWEN = sized((4096, 151936, 2048), (40, 203, 19))
GEMMA = sized((2048, 262208, 1152), (24, 131, 33))
QWEN_SMALL = sized((1024, 151936, 1024), (24, 203, 17))
GATHER, CUBLAS, MIN_MEMORY = ("one_pass", "gather"), ("one_pass", "cublas"), ("min_memory", "auto")
CASES = [
    (QWEN, BF16, GATHER), (GEMMA, BF16, MIN_MEMORY), (QWEN, BF16, CUBLAS), (GEMMA, BF16, GATHER),
    (QWEN, BF16, MIN_MEMORY), (QWEN_SMALL, FP16, GATHER), (QWEN_SMALL, FP16, MIN_MEMORY),
    (QWEN_SMALL, FP32, CUBLAS), (QWEN_SMALL, FP32, MIN_MEMORY), (QWEN_SMALL, FP32, GATHER),
    (GEMMA, BF16, CUBLAS),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "dtype", "engine"), CASES)
def test_policy_loss_of_a_whole_vocabulary(sizes, dtype, engine):
    inputs = make_inputs(Shape(*sizes, dtype, DEVICE), share_trained=0.8)
    out = policy_loss(
        inputs.hidden_states, inputs.weight, inputs.target_ids, inputs.advantages,
        inputs.token_weights, objective=GRPO, old_logps=inputs.old_logps, engine=engine[0],
        products=engine[1], workspace_mb=4096, implementation="triton",
    )  # fmt: skip
    hidden_grad, weight_grad = torch.autograd.grad(out.loss, [inputs.hidden_states, inputs.weight])
    truth = policy_reference(
        inputs.hidden_states.detach(), inputs.weight.detach(), inputs.target_ids,
        inputs.advantages, inputs.token_weights, inputs.old_logps, 1.0,
    )  # fmt: skip
    found = Outputs(out.loss.detach(), out.logps, out.entropies)
    errors = compare(found, truth, hidden_grad, weight_grad)
    assert errors.within(TOLERANCES[dtype]), errors
    assert (hidden_grad[inputs.advantages == 0] == 0).all()


@pytest.mark.parametrize(("sizes", "dtype"), [(GEMMA, BF16), (QWEN, FP16), (QWEN_SMALL, FP32)])
def test_linear_logps_of_a_whole_vocabulary(sizes, dtype):
    inputs = make_inputs(Shape(*sizes, dtype, DEVICE))
    leaves = hidden, weight = inputs.hidden_states, inputs.weight
    out = linear_logps(hidden, weight, inputs.target_ids, implementation="triton")
    slopes = inputs.logp_slopes, inputs.entropy_slopes
    gradients = torch.autograd.grad([out.logps, out.entropies], leaves, slopes)
    wide = hidden.detach(), weight.detach()
    statistics = row_statistics(*wide, inputs.target_ids, 1.0, torch.float64)
    truth = with_gradients(statistics, *wide, inputs.target_ids, *slopes, 1.0)
    errors = compare(Outputs(None, out.logps, out.entropies), truth, *gradients)
    assert errors.within(TOLERANCES[dtype]), errors
    assert (out.lse - statistics.lse).abs().max() <= 1e-3


def test_a_head_of_more_than_two_to_the_31_numbers():
    """Targets in its last columns, which a 32-bit offset would miss."""
    num_tokens, vocab_size, width = sized((67, 262208, 8256), (9, 203, 19))
    generator = make_generator()
    weight = torch.empty(vocab_size, width, dtype=BF16, device=DEVICE)
    for rows in weight.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=DEVICE) / width**0.5)
    target_ids = torch.arange(vocab_size - num_tokens, vocab_size, device=DEVICE)
    hidden = (4 * weight[target_ids].float()).to(BF16).requires_grad_()
    out = linear_logps(hidden, weight.requires_grad_(), target_ids, implementation="triton")
    gradients = torch.autograd.grad(out.logps.sum(), [hidden, weight])
    truth = [torch.empty(num_tokens, vocab_size, dtype=torch.float64, device=DEVICE)]
    wide, start = hidden.detach().double(), 0
    for rows in weight.detach().split(16384):
        torch.mm(wide, rows.double().T, out=truth[0][:, start : start + len(rows)])
        start += len(rows)
    log_probs = truth[0].log_softmax(-1)
    expected = log_probs.gather(1, target_ids[:, None])[:, 0]
    assert (out.logps - expected).abs().max() <= 1e-3
    slopes = -log_probs.exp()
    slopes.scatter_add_(1, target_ids[:, None], torch.ones_like(slopes[:, :1]))
    last = slopes[:, -num_tokens:].T @ wide
    assert relative_error(gradients[1][-num_tokens:], last) < 1e-2
    hidden_grad = torch.zeros_like(wide)
    for rows, part in zip(weight.detach().split(16384), slopes.split(16384, 1), strict=True):
        hidden_grad += part @ rows.double()
    assert relative_error(gradients[0], hidden_grad) < 1e-2


def test_hidden_states_of_more_than_two_to_the_31_numbers():
    num_tokens, vocab_size, width = sized((2**19 + 5, 1000, 4096), (43, 31, 17))
    generator = make_generator()
    hidden = torch.empty(num_tokens, width, dtype=BF16, device=DEVICE)
    for rows in hidden.split(2**15):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=DEVICE))
    weight = torch.randn(vocab_size, width, generator=generator, device=DEVICE) / width**0.5
    weight = weight.to(BF16).requires_grad_()
    target_ids = torch.randint(vocab_size, (num_tokens,), generator=generator, device=DEVICE)
    hidden.requires_grad_()
    out = linear_logps(hidden, weight, target_ids, implementation="triton")
    (found,) = torch.autograd.grad(out.logps.sum(), [hidden])
    last = hidden.detach()[-40:].double().requires_grad_()
    expected = (last @ weight.detach().double().T).log_softmax(-1)
    expected = expected.gather(1, target_ids[-40:, None])[:, 0]
    assert (out.logps[-40:] - expected).abs().max() <= 1e-3
    (gradient,) = torch.autograd.grad(expected.sum(), last)
    assert relative_error(found[-40:], gradient) < 1e-2


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gradients_of_more_than_two_to_the_31_logits(dtype):
    num_tokens, vocab_size = sized((14200, 151936), (11, 203))
    logits = torch.zeros(num_tokens, vocab_size, dtype=dtype, device=DEVICE)
    logits[-1] = torch.linspace(-20, 20, vocab_size, device=DEVICE)
    last = logits[-1:].double().requires_grad_()
    target_ids = torch.full((num_tokens,), -1, device=DEVICE)
    target_ids[-1] = vocab_size - 2
    out = selected_logps(
        logits.requires_grad_(), target_ids, inplace_backward=True, implementation="triton"
    )
    (found,) = torch.autograd.grad(out.logps.sum(), logits)
    expected = last.log_softmax(-1)[:, vocab_size - 2]
    (gradient,) = torch.autograd.grad(expected.sum(), last)
    assert (out.logps[-1:] - expected).abs().max() <= 1e-4
    assert relative_error(found[-1:], gradient) < {BF16: 4e-3, FP32: 1e-5}[dtype]
    assert not found[:-1].any()


def test_token_loss_of_a_million_tokens():
    num_tokens = sized(2**20 + 3, 1031)
    numbers = torch.randn(7, num_tokens, generator=make_generator(), device=DEVICE)
    leaves = [x.contiguous().requires_grad_() for x in numbers[:2].unbind()]
    settings = {
        "objective": Objective(clipped_ratio, (0.2, 0.28), (Regulariser(k3, 0.04),)),
        "entropy_coef": 0.01,
    }
    names = ("advantages", "token_weights", "old_logps", "ref_logps", "rollout_weights")
    given = dict(zip(names, numbers[2:], strict=True))
    given |= {name: given[name].abs() for name in ("token_weights", "rollout_weights")}
    given["token_weights"] /= num_tokens
    for name in ("old_logps", "ref_logps"):
        given[name] = numbers[0] + 0.1 * given[name]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = token_loss_reference(*wide, **{k: x.double() for k, x in given.items()}, **settings)
    expected = torch.autograd.grad(truth.loss, wide)

    def run() -> list[Tensor]:
        out = token_loss(*leaves, **given, **settings, implementation="triton")
        return [out.loss.detach(), *out[3:], *torch.autograd.grad(out.loss, leaves)]

    found = run()
    for value, other in zip(found, [truth.loss, *truth[3:], *expected], strict=True):
        distance = (value.double() - other.detach()).norm()
        assert distance <= 1e-4 * other.detach().norm() + 1e-7 * (value.dim() == 0)
    assert_same_on_every_run(run)


def test_adamw_of_more_than_two_to_the_31_weights():
    """The last ones alone have the same bits: chances depend on the place in the parameter."""
    count, tail = sized((2**31 + 2**20 + 256 * 3 + 77, 2**16 + 77), (256 * 5 + 77, 256 + 77))
    generator = make_generator()
    weights = torch.zeros(count, dtype=BF16, device=DEVICE)
    gradients = torch.zeros(count, dtype=BF16, device=DEVICE)
    for x in (weights, gradients):
        x[-tail:] = torch.randn(tail, generator=generator, device=DEVICE)
    blocks = -(-count // 256)
    moments = Moments(
        torch.zeros(count, dtype=torch.int8, device=DEVICE),
        torch.zeros(count, dtype=torch.uint8, device=DEVICE),
        torch.zeros(blocks, device=DEVICE), torch.zeros(blocks, device=DEVICE),
    )  # fmt: skip
    start = count - tail
    few = -(-tail // 256)
    alone = weights[-tail:].clone(), gradients[-tail:].clone()
    alone_moments = Moments(
        *(x[-n:].clone() for x, n in zip(moments, (tail, tail, few, few), strict=True))
    )
    settings = {
        "rates": Rates(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1),
        "keys": Keys(moments=0x123456789ABCDEF0, weights=0x7EDCBA9876543210),
        "implementation": "triton",
    }
    assert start % 256 == 0
    adamw_step(weights, gradients, moments, **settings)
    adamw_step(*alone, alone_moments, start=start, **settings)
    assert torch.equal(weights[-tail:], alone[0])
    assert torch.equal(moments.first[-tail:], alone_moments.first)
    assert torch.equal(moments.second[-tail:], alone_moments.second)
    assert (weights[-tail:] != 0).float().mean() > 0.99
    assert not weights[:start].any()


@pytest.mark.parametrize(("dtype", "batch_invariant"), [(BF16, False), (BF16, True), (FP32, True)])
@pytest.mark.parametrize("what", ["linear_logps", *[engine for engine, _ in (GATHER, MIN_MEMORY)]])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(what, dtype, batch_invariant):
    """So many rows that one of them alone would share out the vocabulary to more programs."""
    inputs = make_inputs(Shape(*sized((2056, 32003, 2048), (24, 131, 17)), dtype, DEVICE))
    rows = [0, 1, len(inputs.target_ids) // 2, len(inputs.target_ids) - 1]

    def logps(index: slice) -> list[Tensor]:
        options = {"batch_invariant": batch_invariant, "implementation": "triton"}
        hidden = inputs.hidden_states.detach()[index].requires_grad_()
        ids = inputs.target_ids[index]
        if what == "linear_logps":
            out = linear_logps(hidden, inputs.weight, ids, **options)
            gradient = torch.autograd.grad(out.logps.sum() + out.entropies.sum(), hidden)
        else:
            out = policy_loss(
                hidden, inputs.weight, ids, inputs.advantages[index] + 3,
                inputs.token_weights[index], old_logps=inputs.old_logps[index], objective=GRPO,
                engine=what, workspace_mb=512, **options,
            )  # fmt: skip
            gradient = torch.autograd.grad(out.loss, hidden)
        return [out.logps.detach(), out.entropies.detach(), *(gradient if batch_invariant else ())]

    together = logps(slice(None))
    for row in rows:
        for alone, value in zip(logps(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone[0], value[row])


@pytest.mark.parametrize("what", ["linear_logps", "selected_logps"])
def test_runs_of_log_probabilities_give_the_same_bits(what):
    inputs = make_inputs(Shape(*sized((2056, 151936, 512), (24, 203, 17)), BF16, DEVICE))
    leaves: list[Tensor] = [inputs.hidden_states, inputs.weight]
    if what == "selected_logps":
        with torch.no_grad():
            leaves = [inputs.hidden_states @ inputs.weight.T]
        leaves[0].requires_grad_()
    function = linear_logps if what == "linear_logps" else selected_logps

    def run() -> list[Tensor]:
        out = function(*leaves, inputs.target_ids, implementation="triton")
        slopes = inputs.logp_slopes, inputs.entropy_slopes
        return [out.logps, *torch.autograd.grad([out.logps, out.entropies], leaves, slopes)]

    assert_same_on_every_run(run)
