"""AdamW in few bytes against torch's own, against float32 training and against itself resumed."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from fastrl.errors import InputError
from fastrl.optim import LeanAdamW, join, parameter_groups, scale_learning_rate, split
from fastrl.seeding import derive_seed
from fastrl_kernels.adamw.random_bits import random_bits
from fastrl_kernels.adamw.weights import round_by_chance

SHAPES = ((63, 123), (257,), (1,), (5, 7, 3), (300, 401))
ALL_STORES = [
    (w, m) for w in ("float32", "split", "stochastic") for m in ("float32", "8bit", "cpu")
]


def random_parameters(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [torch.nn.Parameter(value) for value in values]


def set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    """Random gradients of very different sizes, the same for every copy of the parameters."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        sizes = torch.exp(3 * torch.randn(parameter.shape, generator=generator))
        parameter.grad = (noise * sizes).to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last):
        set_gradients(parameters, step)
        optimizer.step()


def lean(parameters: list[torch.nn.Parameter], weights: str, moments: str, **options) -> LeanAdamW:
    options = {"lr": 1e-3, "weight_decay": 0.1, "chunk_size": 1024, **options}
    return LeanAdamW(parameters, weights=weights, moments=moments, **options)


def dtype_of(weights: str) -> torch.dtype:
    return torch.float32 if weights == "float32" else torch.bfloat16


def assert_equal(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("moments", ["float32", "cpu"])
@pytest.mark.parametrize("chunk_size", [256, 1024, None])
def test_float32_has_the_bits_of_torch_adamw(moments, chunk_size):
    ours, theirs = random_parameters(0), random_parameters(0)
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    train(LeanAdamW(ours, moments=moments, chunk_size=chunk_size, **options), 0, 20)
    train(torch.optim.AdamW(theirs, foreach=True, **options), 0, 20)
    assert_equal(ours, theirs)


def test_a_scale_has_the_bits_of_a_scaled_gradient():
    ours, theirs = random_parameters(0), random_parameters(0)
    optimizer, expected = LeanAdamW(ours), torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.0)
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    for parameter in ours:
        optimizer.step_parameter(parameter, scale=0.3)
    for parameter in theirs:
        parameter.grad.mul_(0.3)
    expected.step()
    assert_equal(ours, theirs)


def test_the_halves_of_a_split_weight_are_exactly_it():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_001,), generator=generator).to(torch.int32)
    masters = bits.view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1.0, float("inf"), -float("inf"), 1e-40, -1e-45, 3.4e38])
    masters = torch.cat([masters, special, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])])
    weights, remainders = split(masters)
    assert torch.equal(join(weights, remainders).view(torch.int32), masters.view(torch.int32))
    finite = masters.abs() < 3e38
    error = (weights.double() - masters.double()).abs()[finite]
    nearest = (masters.bfloat16().double() - masters.double()).abs()[finite]
    assert torch.equal(error, nearest)  # both neighbours are as near where a tie goes another way
    assert split(torch.tensor([1 + 2**-8])).weights == 1 + 2**-7  # away from zero, not to even


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_thousand_small_steps_of_split_weights_are_those_of_float32(moments):
    """At a step size of 1e-6 a bfloat16 weight alone does not move at all."""
    start = [p.detach().bfloat16() for p in random_parameters(1)[:4]]
    split_ones = [torch.nn.Parameter(p.clone()) for p in start]
    full = [torch.nn.Parameter(p.float()) for p in start]
    plain = [torch.nn.Parameter(p.clone()) for p in start]
    options = {"lr": 1e-6, "weight_decay": 0.01}
    optimizers = [
        LeanAdamW(split_ones, weights="split", moments=moments, **options),
        LeanAdamW(full, moments=moments, **options),
        torch.optim.AdamW(plain, foreach=True, **options),
    ]
    for step in range(1000):
        set_gradients(split_ones, step)
        for other in (full, plain):
            for parameter, one in zip(other, split_ones, strict=True):
                parameter.grad = one.grad.to(parameter.dtype)
        for optimizer in optimizers:
            optimizer.step()
    for parameter, expected in zip(split_ones, full, strict=True):
        remainders = optimizers[0].state[parameter]["remainders"].view(parameter.shape)
        assert torch.equal(join(parameter.detach(), remainders), expected)
    moved = torch.cat([(a - b.float()).abs().flatten() for a, b in zip(full, start, strict=True)])
    assert moved.median() > 1e-5
    large = [b.abs() > 0.01 for b in start]  # where half a unit of bfloat16 is far above the step
    stuck = [(a == b)[c] for a, b, c in zip(plain, start, large, strict=True)]
    assert torch.cat([x.flatten() for x in stuck]).float().mean() > 0.99


def test_rounding_by_chance_is_unbiased():
    """The mean over seeds and elements is the float32 value, within 4 standard errors."""
    generator = torch.Generator().manual_seed(2)
    masters = torch.randn(4096, generator=generator)
    masters = torch.cat([masters, -masters, masters * 1e-3])
    total, num_seeds = torch.zeros(len(masters), dtype=torch.float64), 400
    for seed in range(num_seeds):
        bits = random_bits(0, len(masters), derive_seed(seed, "weights"), masters.device)
        rounded = round_by_chance(masters, bits)
        unit = torch.exp2(masters.abs().log2().floor() - 7)
        assert ((rounded.float() - masters).abs() < unit).all()  # to one of the two neighbours
        total += (rounded.double() - masters.double()) / unit
    part = (masters.double().abs() / unit).frac()
    variance = part * (1 - part)
    biggest = (total.abs() / (num_seeds * variance).clamp_min(0.1).sqrt()).max()
    assert biggest < 5  # of 12288 elements the largest of as many normal numbers is 4.0
    assert total.sum().abs() < 4 * (num_seeds * variance.sum()).sqrt()


def test_stochastic_weights_drift_with_float32_ones():
    """1000 steps of 1e-6 each against a weight whose bfloat16 neighbour is 4e-3 away."""
    ours = torch.nn.Parameter(torch.full((40_000,), 0.5, dtype=torch.bfloat16))
    full = torch.nn.Parameter(torch.full((1,), 0.5))
    optimizer, expected = (
        LeanAdamW([ours], lr=1e-6, weights="stochastic"),
        LeanAdamW([full], lr=1e-6),
    )
    for _ in range(1000):
        ours.grad, full.grad = torch.ones_like(ours), torch.ones_like(full)
        optimizer.step()
        expected.step()
    moved = ours.double() - 0.5
    error = moved.std() / len(moved) ** 0.5
    assert (moved.mean() - (full.double() - 0.5)).abs() < 4 * error
    assert moved.mean() < -20 * error


def test_random_bits_are_even_and_unrelated():
    """Each bit is set half of the time, also given any other bit, step, parameter or neighbour."""
    count = 1 << 16
    streams = [
        random_bits(start, count, derive_seed(0, purpose, parameter, step), torch.device("cpu"))
        for start, step, parameter, purpose in (
            (0, 1, 0, "weights"), (1, 1, 0, "weights"), (0, 2, 0, "weights"), (0, 1, 1, "weights"),
            (0, 1, 0, "moments"),
        )
    ]  # fmt: skip
    signs = torch.cat([(x[:, None] >> torch.arange(32)) & 1 for x in streams], dim=1) * 2.0 - 1
    bound = 6 * count**-0.5
    assert signs.mean(dim=0).abs().max() < bound
    correlation = signs.T @ signs / count - torch.eye(signs.shape[1])
    assert correlation.abs().max() < bound
    assert torch.equal(streams[0][1:], streams[1][:-1])  # a position's bits are its own


@pytest.mark.parametrize(("weights", "moments"), ALL_STORES)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(weights, moments):
    whole = random_parameters(3, dtype_of(weights))
    train(lean(whole, weights, moments), 0, 12)
    resumed = random_parameters(3, dtype_of(weights))
    optimizer = lean(resumed, weights, moments)
    train(optimizer, 0, 7)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(resumed)
    optimizer = lean(resumed, weights, moments)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, 7, 12)
    assert_equal(resumed, whole)


@pytest.mark.parametrize(("weights", "moments"), ALL_STORES)
def test_chunks_do_not_change_the_bits(weights, moments):
    """Nor does it matter that parameters are stepped in another order."""
    one, other = (random_parameters(4, dtype_of(weights)) for _ in range(2))
    train(lean(one, weights, moments, chunk_size=256), 0, 5)
    optimizer = lean(other, weights, moments, chunk_size=None)
    for step in range(5):
        set_gradients(other, step)
        for parameter in reversed(other):
            optimizer.step_parameter(parameter)
    assert_equal(one, other)


def test_a_state_of_another_store_is_refused():
    optimizer = lean(random_parameters(0), "float32", "8bit")
    train(optimizer, 0, 1)
    with pytest.raises(ValueError, match="do not fit float32 moments"):
        lean(random_parameters(0), "float32", "float32").load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="groups of \\[4\\] parameters, got \\[5\\]"):
        lean(random_parameters(0)[:4], "float32", "8bit").load_state_dict(optimizer.state_dict())


def test_parameters_that_would_lose_updates_are_refused():
    with pytest.raises(InputError, match="loses small updates"):
        LeanAdamW(random_parameters(0, torch.bfloat16))
    with pytest.raises(InputError, match="contiguous"):
        LeanAdamW([torch.nn.Parameter(torch.zeros(3, 5).T)])


def test_groups_have_rates_of_their_own_and_decay_matrices_alone():
    model, other = torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)
    groups = parameter_groups(model, learning_rate=1e-2, weight_decay=0.5)
    groups += parameter_groups(other, learning_rate=3e-3, weight_decay=0.5)
    optimizer = LeanAdamW(groups)
    assert scale_learning_rate(optimizer, 0.1) == 1e-2 * 0.1
    before = [p.detach().clone() for p in (*model.parameters(), *other.parameters())]
    for parameter in (*model.parameters(), *other.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, start, rate in zip(
        (*model.parameters(), *other.parameters()), before, (1e-3, 1e-3, 3e-4, 3e-4), strict=True
    ):
        decay = 0.5 if parameter.dim() == 2 else 0.0
        torch.testing.assert_close(parameter.detach(), start * (1 - rate * decay) - rate)
