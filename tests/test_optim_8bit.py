"""Moments in 8 bits: what rounding does to a value, to an average over time, and to training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastrl.optim import LeanAdamW
from fastrl_kernels.adamw.blockwise import (
    BLOCK_SIZE,
    FIRST,
    SECOND,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)

LARGE_ENOUGH = 4096 + 33
"""Smaller parameters have float32 moments."""

CODECS = {
    "first": (encode_first, decode_first, FIRST),
    "second": (encode_second, decode_second, SECOND),
}


def values_of(kind: str, count: int, seed: int = 0) -> Tensor:
    """Sizes over fourteen powers of e in a block, so that some are below the lowest level."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.exp(3 * torch.randn(count, generator=generator))
    if kind == "second":
        return values.square()
    return values * torch.randn(count, generator=generator).sign()


def chances_of(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_a_code_is_one_of_the_two_levels_around_its_value(kind, count):
    encode, decode, levels = CODECS[kind]
    values = values_of(kind, count)
    codes, scales = encode(values, chances_of(count, 1))
    assert codes.element_size() == 1
    assert len(scales) == -(-count // BLOCK_SIZE)
    found = decode(codes, scales)
    lowest = scales.repeat_interleave(BLOCK_SIZE)[:count] * 2.0**-levels.octaves
    within = values.abs() >= lowest
    ratio = (found / values)[within]
    assert ((ratio > 0.9999 / levels.ratio) & (ratio < 1.0001 * levels.ratio)).all()
    largest = nn.functional.pad(values.abs(), (0, -count % BLOCK_SIZE)).view(-1, BLOCK_SIZE).amax(1)
    assert torch.equal(found.abs().max(), largest.max())  # the largest of a block is exact


@pytest.mark.parametrize("kind", CODECS)
def test_a_code_that_is_decoded_and_encoded_again_is_the_same(kind):
    """So a moment that does not change does not wander, whatever the chances."""
    encode, decode, levels = CODECS[kind]
    codes = torch.arange(1, levels.size + 1)
    codes = nn.functional.pad(codes, (BLOCK_SIZE - len(codes), 0))
    codes = codes.to(torch.int8 if kind == "first" else torch.uint8)
    scales = torch.tensor([0.37])
    for seed in range(20):
        again, new_scales = encode(decode(codes, scales), chances_of(len(codes), seed))
        assert torch.equal(scales, new_scales)
        assert ((again.int() - codes.int()).abs() <= 1).all()
        assert (again != codes).float().mean() < 2e-3


@pytest.mark.parametrize("kind", CODECS)
def test_rounding_to_levels_is_unbiased(kind):
    encode, decode, levels = CODECS[kind]
    values = values_of(kind, 2560)
    num_seeds = 400
    draws = [encode(values, chances_of(len(values), seed)) for seed in range(num_seeds)]
    found = torch.stack([decode(*draw).double() for draw in draws])
    lowest = draws[0][1].repeat_interleave(BLOCK_SIZE) * 2.0**-levels.octaves
    counted = (values.abs() >= lowest) | (kind == "first")  # below, a second moment is rounded up
    unit = torch.maximum(values.abs() * (levels.ratio - 1), lowest)[counted]
    error = (found.mean(0) - values.double())[counted] / unit
    # Half a unit is the largest standard deviation that two neighbours can have.
    assert error.abs().max() < 5 * 0.5 / num_seeds**0.5
    assert error.mean().abs() < 4 * 0.5 / (num_seeds * len(error)) ** 0.5


def test_a_second_moment_is_zero_only_where_it_is():
    """Also 30 powers of ten below the largest of its block, where its first moment may be large."""
    values = torch.tensor([1.0, 1e-8, 1e-12, 1e-30, 0.0, 1e-38])
    for seed in range(50):
        codes, scales = encode_second(values, chances_of(len(values), seed))
        assert torch.equal(codes == 0, values == 0)
        assert (decode_second(codes, scales)[values > 0] >= 2.0**-SECOND.octaves * 0.999).all()
    zeros, scales = encode_second(torch.zeros(300), chances_of(300, 0))
    assert torch.equal(decode_second(zeros, scales), torch.zeros(300))
    assert torch.equal(
        decode_first(*encode_first(torch.zeros(300), chances_of(300, 0))), zeros.float()
    )


def test_an_element_is_never_stepped_by_a_vanished_second_moment():
    """Beside one element with a gradient a million times larger, steps stay of the usual size."""
    parameter = nn.Parameter(torch.zeros(LARGE_ENOUGH))
    optimizer = LeanAdamW([parameter], lr=1e-3, moments="8bit")
    gradient = torch.full_like(parameter, 1e-6)
    gradient[::BLOCK_SIZE] = 1.0
    for step in range(50):
        parameter.grad = gradient * (1 if step % 3 else -1)
        before = parameter.detach().clone()
        optimizer.step()
        assert (parameter - before).abs().max() < 1.5e-3


def test_a_second_moment_follows_its_gradients_where_the_nearest_level_would_stay():
    """Gradients fall to a tenth: after 8000 steps the moment is that of the new ones.

    Rounding by chance costs noise: an average over 1000 steps of moves to a level 9 % away, whose
    standard deviation is sqrt(0.09 / 2), a fifth of the moment and a tenth of the step.
    """
    count, beta2 = 4096, 0.999
    generator = torch.Generator().manual_seed(0)
    exact = torch.full((count,), 1.0)
    exact[::BLOCK_SIZE] = 10.0  # keeps the scale where it is
    stored = by_nearest = encode_second(exact, torch.full((count,), 0.5))
    for step in range(8000):
        new = 0.01 * torch.randn(count, generator=generator).square()
        new[::BLOCK_SIZE] = 10.0

        def averaged(codes: Tensor, scales: Tensor, new: Tensor = new) -> Tensor:
            return beta2 * decode_second(codes, scales) + (1 - beta2) * new

        exact = beta2 * exact + (1 - beta2) * new
        stored = encode_second(averaged(*stored), chances_of(count, step))
        by_nearest = encode_second(averaged(*by_nearest), torch.full((count,), 0.5))
    small = torch.arange(count) % BLOCK_SIZE != 0
    ratio = (decode_second(*stored) / exact)[small]
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    assert 0.15 < ratio.std() < 0.25
    assert (decode_second(*by_nearest) / exact)[small].median() > 50  # it has not moved


def test_least_squares_converge_as_in_float32():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 96, generator=generator)
    targets = inputs @ torch.randn(96, 64, generator=generator)

    def losses(moments: str) -> Tensor:
        weight = nn.Parameter(torch.zeros(96, 64))
        optimizer = LeanAdamW([weight], lr=3e-2, moments=moments)
        found = []
        for step in range(600):
            rows = torch.randint(512, (64,), generator=torch.Generator().manual_seed(step))
            loss = (inputs[rows] @ weight - targets[rows]).square().mean()
            weight.grad = None
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    exact, stored = losses("float32"), losses("8bit")
    assert exact[0] > 50
    steps = slice(0, 300)  # from 90 to a hundredth
    assert (stored[steps].log() - exact[steps].log()).abs().mean() < 0.15
    assert stored[-50:].mean() < 1e-3


class TinyTransformer(nn.Module):
    """Two layers that learn to copy what stood eight tokens before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32 + 32, 64)
        layer = nn.TransformerEncoderLayer(
            64, 4, 128, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        positions = self.embedding.weight[32 : 32 + length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.layers(self.embedding(ids) + positions, mask=mask, is_causal=True))


def transformer_losses(weights: str, moments: str) -> Tensor:
    torch.manual_seed(0)
    model = TinyTransformer()
    if weights != "float32":
        model = model.bfloat16()
    optimizer = LeanAdamW(model.parameters(), lr=2e-3, weights=weights, moments=moments)
    found = []
    for step in range(300):
        ids = torch.randint(32, (16, 8), generator=torch.Generator().manual_seed(step)).repeat(1, 3)
        logits = model(ids[:, :-1])[:, 8:]
        loss = nn.functional.cross_entropy(logits.float().reshape(-1, 32), ids[:, 9:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("weights", ["float32", "split", "stochastic"])
def test_a_transformer_learns_as_in_float32(weights):
    """From 3.5 nats to 0.001: on average a five hundredth of a nat away, never a twentieth."""
    exact = transformer_losses("float32", "float32")
    found = transformer_losses(weights, "8bit")
    assert exact[:10].mean() > 3.4
    assert (found - exact).abs().mean() < 0.002
    assert (found - exact).abs().max() < 0.05
    assert found[-50:].mean() < 0.0015
