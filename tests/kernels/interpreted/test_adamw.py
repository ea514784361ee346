"""adamw_step: the kernel against the reference, for every way to keep weights and moments."""

import itertools

import pytest
import torch

from fastrl_kernels.adamw import Keys, Moments, Rates, adamw_step, join, split
from fastrl_kernels.adamw.blockwise import (
    FIRST,
    SECOND,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)
from tests.kernels.adamw_cases import KEPT, Case, make_case, stepped

RATES = Rates(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=5)
KEYS = Keys(moments=0x123456789ABCDEF0, weights=0x7EDCBA9876543210)
COUNTS = [1, 255, 256, 1024, 1025, 5003]  # a program has 1024


def both(case: Case, **options) -> tuple[Case, Case]:
    """The case after one step of the kernel, and of the reference."""
    options = {"keys": KEYS, "scale": 0.3, **options}
    return tuple(
        stepped(case, RATES, implementation=name, **options) for name in ("triton", "torch")
    )


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("in_8bit", [False, True])
@pytest.mark.parametrize("half_gradients", [False, True])
def test_one_step(kept: str, count: int, in_8bit: bool, half_gradients: bool) -> None:
    case = make_case(count, kept=kept, in_8bit=in_8bit, half_gradients=half_gradients)
    found, expected = both(case)
    weights, exact = found.masters, expected.masters
    if kept == "stochastic":  # the same chances: all but a few round the same way
        differ = weights != exact
        assert differ.float().mean() < 2e-3
        assert ((weights - exact).abs() <= exact.abs() * 2**-7).all()
    else:
        torch.testing.assert_close(weights, exact, rtol=1e-6, atol=1e-7)
    assert count < 256 or not torch.equal(exact, case.masters)
    for one, other, levels in zip(found.decoded, expected.decoded, (FIRST, SECOND), strict=True):
        if not in_8bit:
            terms = case.decoded[0].abs() + case.gradients.float().abs()
            terms = terms if levels is FIRST else case.decoded[1] + terms.square()
            assert ((one - other).abs() <= 5e-7 * terms).all()
            continue
        near = torch.isclose(one, other, rtol=1e-4, atol=0)
        assert near.float().mean() > 0.998 or int((~near).sum()) <= 1
        ratio = (one / other)[~near].abs()
        assert ((ratio < levels.ratio * 1.001) & (ratio > 0.999 / levels.ratio)).all()


@pytest.mark.parametrize(("kept", "in_8bit"), itertools.product(KEPT, [False, True]))
def test_pieces_have_the_bits_of_the_whole(kept: str, in_8bit: bool) -> None:
    case = make_case(3000, kept=kept, in_8bit=in_8bit, half_gradients=True)
    whole = stepped(case, RATES, implementation="triton", keys=KEYS)
    pieces = [
        stepped(case.part(span), RATES, implementation="triton", keys=KEYS, start=span.start)
        for span in (slice(0, 512), slice(512, 1792), slice(1792, 3000))
    ]
    for index, tensor in enumerate(whole.tensors):
        assert torch.equal(torch.cat([piece.tensors[index] for piece in pieces]), tensor)


def test_split_weights_are_the_float32_ones_to_the_bit() -> None:
    full = make_case(2000, kept="float32", in_8bit=True, half_gradients=True)
    upper, remainders = split(full.weights)
    half = full._replace(weights=upper, remainders=remainders)
    for _ in range(5):
        full = stepped(full, RATES, implementation="triton", keys=KEYS)
        half = stepped(half, RATES, implementation="triton", keys=KEYS)
    assert half.remainders is not None
    assert torch.equal(join(half.weights, half.remainders), full.weights)


def test_rounding_by_chance_has_the_chances_of_the_reference() -> None:
    """A step of size 0 changes nothing but the rounding, so each bit must be the same."""
    case = make_case(4099, kept="float32", in_8bit=False, half_gradients=False)
    still = RATES._replace(lr=0.0, weight_decay=0.0)
    weights = case.weights.bfloat16()
    found = stepped(case._replace(weights=weights), still, implementation="triton", keys=KEYS)
    assert torch.equal(found.weights, weights)  # a bfloat16 weight is its own neighbour
    codes, scales = encode_second(case.moments.second, torch.rand(4099))
    moments = Moments(
        *encode_first(case.moments.first, torch.rand(4099))[:1], codes,
        encode_first(case.moments.first, torch.rand(4099))[1], scales,
    )  # fmt: skip
    coded = case._replace(moments=moments)
    one, other = (
        stepped(coded, still, implementation=name, keys=KEYS) for name in ("triton", "torch")
    )
    assert (one.moments.first != other.moments.first).float().mean() < 1e-3
    assert (one.moments.second != other.moments.second).float().mean() < 1e-3


def test_a_second_moment_is_zero_only_where_it_is() -> None:
    case = make_case(600, kept="float32", in_8bit=True, half_gradients=False)
    gradients = torch.full((600,), 1e-12)
    gradients[::256] = 1.0
    gradients[5::11] = 0.0
    moments = Moments(*(torch.zeros_like(x) for x in case.moments))
    case = case._replace(moments=moments, gradients=gradients)
    found = stepped(case, RATES, implementation="triton", keys=KEYS)
    assert torch.equal(found.moments.second == 0, gradients == 0)
    first = decode_first(found.moments.first, found.moments.first_scales)
    second = decode_second(found.moments.second, found.moments.second_scales)
    assert (first[second == 0] == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    case = make_case(512, kept="split", in_8bit=True, half_gradients=False)
    with pytest.raises(ValueError, match="start must be a multiple of 256"):
        stepped(case, RATES, implementation="triton", start=100)
    with pytest.raises(ValueError, match="remainders are of bfloat16 weights"):
        stepped(case._replace(weights=case.weights.float()), RATES, implementation="triton")
    with pytest.raises(ValueError, match=r"gradients must be contiguous, of shape \(512,\)"):
        adamw_step(case.weights, case.gradients[:5], case.moments, RATES)
    moments = case.moments._replace(second_scales=None)
    with pytest.raises(ValueError, match="both moments must have scales or neither"):
        adamw_step(case.weights, case.gradients, moments, RATES)
