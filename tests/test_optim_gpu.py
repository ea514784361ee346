"""The optimizer on a GPU: its kernel against torch, moments that come from the CPU, frozen bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastrl.optim import LeanAdamW
from fastrl_kernels.adamw import Keys, Rates
from tests.kernels.adamw_cases import KEPT, make_case, stepped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
RATES = Rates(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=5)
KEYS = Keys(moments=0x123456789ABCDEF0, weights=0x7EDCBA9876543210)
SHAPES = ((1023, 1025), (257,), (5_000_001,))


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("in_8bit", [False, True])
@pytest.mark.parametrize("half_gradients", [False, True])
def test_the_kernel_steps_as_torch_does(kept, in_8bit, half_gradients):
    case = make_case(3_000_001, kept=kept, in_8bit=in_8bit, half_gradients=half_gradients)
    found, again = (
        stepped(case.to("cuda"), RATES, implementation="triton", keys=KEYS) for _ in range(2)
    )
    expected = stepped(case, RATES, implementation="torch", keys=KEYS)
    for one, other in zip(found.tensors, again.tensors, strict=True):
        assert torch.equal(one, other)  # the same bits on every run
    weights, exact = found.masters.cpu(), expected.masters
    if kept == "stochastic":
        assert (weights != exact).float().mean() < 2e-3
    else:
        torch.testing.assert_close(weights, exact, rtol=1e-5, atol=1e-6)
    for one, other in zip(found.to("cpu").decoded, expected.decoded, strict=True):
        near = torch.isclose(one, other, rtol=1e-3, atol=1e-7)
        assert near.float().mean() > (0.995 if in_8bit else 0.99999)


def trained(moments: str, weights: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in SHAPES
    ]
    optimizer = LeanAdamW(parameters, moments=moments, weights=weights, chunk_size=1 << 18)
    for _ in range(6):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise.to("cuda", dtype)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    return [p.detach().cpu() for p in parameters] + [s["exp_avg"].cpu() for s in state.values()]


@pytest.mark.parametrize("weights", KEPT)
def test_moments_from_the_cpu_have_the_bits_of_those_on_the_gpu(weights):
    for found, expected in zip(trained("cpu", weights), trained("float32", weights), strict=True):
        assert torch.equal(found, expected)


def test_moments_on_the_cpu_take_no_memory_of_the_gpu():
    parameter = nn.Parameter(torch.zeros(50_000_000, device="cuda"))
    parameter.grad = torch.ones_like(parameter)
    optimizer = LeanAdamW([parameter], moments="cpu")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= 4 * 4 * (1 << 22) + 2**20
    assert optimizer.state[parameter]["exp_avg"].is_pinned()
