"""`adamw_step` as one Triton kernel: every byte of weights, moments and gradient moves once.

n elements in blocks of 256; one program has a few blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.adamw.blockwise import BLOCK_SIZE, FIRST, SECOND, TINY
from fastrl_kernels.adamw.random_bits import signed
from fastrl_kernels.adamw.reference import ZERO_KEYS, Keys, Moments, Rates
from fastrl_kernels.implementation import on_device

NUM_BLOCKS = 4  # of one program
NUM_WARPS = 4
KEPT = {"float32": 0, "split": 1, "stochastic": 2}  # what weights are kept as


@triton.jit
def random_bits(positions, key_low, key_high):
    """As `fastrl_kernels.adamw.random_bits`, for uint32 positions and halves of the key."""
    bits = positions + key_high.to(tl.uint32)
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits += key_low.to(tl.uint32)
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return bits


@triton.jit
def float_of_half(bits):
    """float32 values whose upper halves are given as int16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def load_weights(weights_ptr, remainders_ptr, offsets, mask, WEIGHTS: tl.constexpr):
    """Their float32 values."""
    weights = tl.load(weights_ptr + offsets, mask, 0)
    if WEIGHTS == 1:
        remainders = tl.load(remainders_ptr + offsets, mask, 0).to(tl.int32)
        weights = ((weights.to(tl.int32) << 16) + remainders).to(tl.float32, bitcast=True)
    elif WEIGHTS == 2:
        weights = float_of_half(weights)
    return weights


@triton.jit
def store_weights(
    weights_ptr, remainders_ptr, offsets, mask, weights, random, WEIGHTS: tl.constexpr
):  # fmt: skip
    """Put float32 values back; random: 32 bits each, for the last way to keep them."""
    bits = weights.to(tl.int32, bitcast=True)
    if WEIGHTS == 0:
        tl.store(weights_ptr + offsets, weights, mask)
    elif WEIGHTS == 1:
        upper = (bits + 0x8000) >> 16
        tl.store(weights_ptr + offsets, upper.to(tl.int16), mask)
        tl.store(remainders_ptr + offsets, (bits - (upper << 16)).to(tl.int16), mask)
    else:
        upper = (bits + (random & 0xFFFF).to(tl.int32)) >> 16
        tl.store(weights_ptr + offsets, upper.to(tl.int16), mask)


@triton.jit
def decoded(codes, scales, SIZE: tl.constexpr, PER_OCTAVE: tl.constexpr):
    """Levels 0 to SIZE, as floats, of blocks with these scales."""
    parts = tl.where(codes > 0.0, tl.exp2((codes - SIZE) / PER_OCTAVE), 0.0)
    return parts * scales[:, None]


@triton.jit
def encoded(
    values, chances, LOWEST: tl.constexpr, SIZE: tl.constexpr, PER_OCTAVE: tl.constexpr,
    STEP: tl.constexpr, ROUNDS_UP: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Levels of non-negative values, as floats, and the scales of their blocks.

    STEP: ratio of two levels, minus 1. ROUNDS_UP: a value below the lowest level becomes that
    level, rather than that or zero by chance.
    """
    scales = tl.max(values, 1)
    parts = values / tl.maximum(scales, LEAST)[:, None]
    exact = tl.log2(tl.maximum(parts, LOWEST)) * PER_OCTAVE + SIZE
    lower = tl.floor(exact)
    way = (tl.exp2((exact - lower) / PER_OCTAVE) - 1.0) / STEP
    levels = lower + tl.where(chances < way, 1.0, 0.0)
    levels = tl.minimum(tl.maximum(levels, 1.0), SIZE)
    if ROUNDS_UP:
        levels = tl.where(parts > 0.0, levels, 0.0)
    else:
        by_chance = tl.where(chances < parts / LOWEST, 1.0, 0.0)
        levels = tl.where(parts < LOWEST, by_chance, levels)
    return levels, scales


@triton.jit(
    do_not_specialize=[
        "num_elements", "start", "moment_key_low", "moment_key_high", "weight_key_low",
        "weight_key_high",
    ]
)  # fmt: skip
def adamw_kernel(
    weights_ptr, remainders_ptr, gradients_ptr, first_ptr, second_ptr, first_scales_ptr,
    second_scales_ptr, num_elements, start, scale, decay, rest1, beta2, rest2, step_size,
    correction, eps, moment_key_low, moment_key_high, weight_key_low, weight_key_high,
    WEIGHTS: tl.constexpr, HALF_GRADIENTS: tl.constexpr, IN_8BIT: tl.constexpr,
    FIRST_SIZE: tl.constexpr, FIRST_PER_OCTAVE: tl.constexpr, FIRST_LOWEST: tl.constexpr,
    FIRST_STEP: tl.constexpr, SECOND_SIZE: tl.constexpr, SECOND_PER_OCTAVE: tl.constexpr,
    SECOND_LOWEST: tl.constexpr, SECOND_STEP: tl.constexpr, LEAST: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Steps BLOCKS blocks in place. bfloat16 comes as int16, whose bits are a float32's upper half.

    decay: 1 - lr * weight_decay. rest1, rest2: 1 - beta of both moments, which float32 betas would
    give with few digits. step_size: lr over the first moment's correction. correction: root of the
    second's.
    """
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offsets = blocks[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    mask = offsets < num_elements
    has_block = blocks * BLOCK_SIZE < num_elements
    positions = (offsets + start).to(tl.uint32)

    weights = load_weights(weights_ptr, remainders_ptr, offsets, mask, WEIGHTS)
    gradients = tl.load(gradients_ptr + offsets, mask, 0)
    if HALF_GRADIENTS:
        gradients = float_of_half(gradients)
    gradients *= scale
    first = tl.load(first_ptr + offsets, mask, 0).to(tl.float32)
    second = tl.load(second_ptr + offsets, mask, 0).to(tl.float32)
    if IN_8BIT:
        scales = tl.load(first_scales_ptr + blocks, has_block, 0.0)
        sizes = decoded(tl.abs(first), scales, FIRST_SIZE, FIRST_PER_OCTAVE)
        first = tl.where(first < 0.0, -sizes, sizes)
        scales = tl.load(second_scales_ptr + blocks, has_block, 0.0)
        second = decoded(second, scales, SECOND_SIZE, SECOND_PER_OCTAVE)

    first += rest1 * (gradients - first)
    second = beta2 * second + rest2 * gradients * gradients
    weights = weights * decay - step_size * first / (tl.sqrt(second) / correction + eps)

    if IN_8BIT:
        random = random_bits(positions, moment_key_low, moment_key_high)
        chances = (random & 0xFFFF).to(tl.float32) * (1.0 / 65536)
        levels, scales = encoded(
            tl.abs(first), chances, FIRST_LOWEST, FIRST_SIZE, FIRST_PER_OCTAVE, FIRST_STEP, False,
            LEAST,
        )  # fmt: skip
        tl.store(first_ptr + offsets, tl.where(first < 0.0, -levels, levels).to(tl.int8), mask)
        tl.store(first_scales_ptr + blocks, scales, has_block)
        chances = (random >> 16).to(tl.float32) * (1.0 / 65536)
        levels, scales = encoded(
            second, chances, SECOND_LOWEST, SECOND_SIZE, SECOND_PER_OCTAVE, SECOND_STEP, True, LEAST
        )
        tl.store(second_ptr + offsets, levels.to(tl.uint8), mask)
        tl.store(second_scales_ptr + blocks, scales, has_block)
    else:
        tl.store(first_ptr + offsets, first, mask)
        tl.store(second_ptr + offsets, second, mask)
    random = random_bits(positions, weight_key_low, weight_key_high)
    store_weights(weights_ptr, remainders_ptr, offsets, mask, weights, random, WEIGHTS)


def constants(*, kept: str, half_gradients: bool, in_8bit: bool) -> dict[str, object]:
    """What the kernel is compiled for."""
    return {
        "WEIGHTS": KEPT[kept],
        "HALF_GRADIENTS": half_gradients,
        "IN_8BIT": in_8bit,
        "FIRST_SIZE": float(FIRST.size),
        "FIRST_PER_OCTAVE": FIRST.per_octave,
        "FIRST_LOWEST": 2.0**-FIRST.octaves,
        "FIRST_STEP": FIRST.ratio - 1,
        "SECOND_SIZE": float(SECOND.size),
        "SECOND_PER_OCTAVE": SECOND.per_octave,
        "SECOND_LOWEST": 2.0**-SECOND.octaves,
        "SECOND_STEP": SECOND.ratio - 1,
        "LEAST": TINY,
        "BLOCKS": NUM_BLOCKS,
        "BLOCK_SIZE": BLOCK_SIZE,
    }


def adamw_step_triton(
    weights: Tensor, gradients: Tensor, moments: Moments, rates: Rates, *, scale: float = 1.0,
    remainders: Tensor | None = None, start: int = 0, keys: Keys = ZERO_KEYS,
) -> None:  # fmt: skip
    """See `adamw_step`."""
    kept = "float32"
    if weights.dtype == torch.bfloat16:
        kept = "stochastic" if remainders is None else "split"
        weights = weights.view(torch.int16)
    half_gradients = gradients.dtype == torch.bfloat16
    correction1, correction2 = rates.corrections
    num_programs = triton.cdiv(len(weights), NUM_BLOCKS * BLOCK_SIZE)
    with on_device(weights):
        adamw_kernel[(num_programs,)](
            weights, remainders, gradients.view(torch.int16) if half_gradients else gradients,
            moments.first, moments.second, moments.first_scales, moments.second_scales,
            len(weights), start, scale, 1 - rates.lr * rates.weight_decay, 1 - rates.beta1,
            rates.beta2, 1 - rates.beta2, rates.lr / correction1, correction2**0.5, rates.eps,
            signed(keys.moments), signed(keys.moments >> 32),
            signed(keys.weights), signed(keys.weights >> 32),
            **constants(
                kept=kept, half_gradients=half_gradients,
                in_8bit=moments.first_scales is not None,
            ),
            num_warps=NUM_WARPS,
        )  # fmt: skip
