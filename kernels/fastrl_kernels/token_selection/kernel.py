"""Triton: the smallest score that is kept, found eight bits at a time, and then who is above it.

Scores are compared as unsigned integers of the same order. A pass counts the values of the next
eight bits, the digit, among the tokens that agree with the threshold in all digits before; the
next pass adds the counts up and so knows one digit more. Every program has a consecutive chunk of
one sequence and a row of counts of its own: no atomics, the same bits on every run. The counts of
the last digit are also the ties in each chunk, by which the last kernel keeps the earlier ones.
"""

import triton
import triton.language as tl

NUM_DIGITS = tl.constexpr(256)
ROWS = tl.constexpr(16)  # of counts that are added up at a time
NUM_PASSES = tl.constexpr(4)


@triton.jit
def chunk(bounds_ptr, BLOCK: tl.constexpr):
    """First token of the program, and the first behind its last; whole blocks but at the end."""
    start = tl.load(bounds_ptr + tl.program_id(0))
    end = tl.load(bounds_ptr + tl.program_id(0) + 1)
    size = tl.cdiv(tl.cdiv(end - start, BLOCK), tl.num_programs(1)) * BLOCK
    first = start + tl.program_id(1) * size
    return first, tl.minimum(first + size, end)


@triton.jit
def load_ordered(scores_ptr, mask_ptr, token, inside, HAS_MASK: tl.constexpr):
    """Scores as unsigned integers of the same order, and which of the tokens may be kept."""
    score = tl.load(scores_ptr + token, inside, 0.0).to(tl.float32)
    bits = score.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits).to(tl.uint32)  # -0 equals 0
    key = bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    key = tl.where(score != score, 0xFFFFFFFF, key).to(tl.uint32)
    counted = inside
    if HAS_MASK:
        counted = inside & (tl.load(mask_ptr + token, inside, 0) != 0)
    return key, counted


@triton.jit
def counts_row(counts_ptr, level, program):
    """Where a program of this one's sequence keeps its counts; passes alternate between two."""
    row = (level % 2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    return counts_ptr + (row * tl.num_programs(1) + program) * NUM_DIGITS


@triton.jit
def state_of(state_ptr, level):
    """Where the sequence's threshold and remaining number are kept, as known before a pass."""
    return state_ptr + (level.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2


@triton.jit
def number_kept(num_candidates, ratio_ptr, budget, HAS_RATIO: tl.constexpr):
    """`number_kept` of the reference."""
    wanted = budget
    if HAS_RATIO:
        share = tl.load(ratio_ptr) * num_candidates.to(tl.float64) + 1e-9
        wanted = tl.maximum(share.to(tl.int32), 1)
    return tl.minimum(wanted, num_candidates)


@triton.jit
def narrow(counts_ptr, state_ptr, ratio_ptr, budget, level, HAS_RATIO: tl.constexpr):
    """What the counts of the pass before tell: threshold, number to keep at it, last digit.

    The threshold has its digits before `level` and zeros behind them; so many of the tokens that
    agree with these digits are kept.
    """
    digit = tl.arange(0, NUM_DIGITS)
    counts = tl.zeros([NUM_DIGITS], tl.int32)
    for first in range(0, tl.num_programs(1), ROWS):
        program = first + tl.arange(0, ROWS)
        rows = counts_row(counts_ptr, level - 1, program)[:, None] + digit[None, :]
        counts += tl.sum(tl.load(rows, (program < tl.num_programs(1))[:, None], 0), 0)
    total = tl.sum(counts, 0)
    threshold = tl.full([], 0, tl.uint32)
    remaining = number_kept(total, ratio_ptr, budget, HAS_RATIO)
    if level > 1:
        known = state_of(state_ptr, level - 1)
        threshold = tl.load(known).to(tl.uint32, bitcast=True)
        remaining = tl.load(known + 1)
    at_least = total - tl.cumsum(counts, 0) + counts
    chosen = tl.sum((at_least >= remaining).to(tl.int32), 0) - 1
    remaining -= tl.sum(tl.where(digit > chosen, counts, 0), 0)
    threshold = threshold | (chosen.to(tl.uint32) << (32 - 8 * level).to(tl.uint32))
    return threshold, remaining, chosen


@triton.jit(do_not_specialize=["budget", "level"])
def count_digits_kernel(
    scores_ptr, mask_ptr, bounds_ptr, ratio_ptr, counts_ptr, state_ptr, budget, level,
    HAS_MASK: tl.constexpr, HAS_RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values of digit `level`, of those that agree with the threshold in the digits before it."""
    threshold = tl.full([], 0, tl.uint32)
    if level > 0:
        threshold, remaining, _ = narrow(counts_ptr, state_ptr, ratio_ptr, budget, level, HAS_RATIO)
        if tl.program_id(1) == 0:
            known = state_of(state_ptr, level)
            tl.store(known, threshold.to(tl.int32, bitcast=True))
            tl.store(known + 1, remaining)
    first, end = chunk(bounds_ptr, BLOCK)
    counts = tl.zeros([NUM_DIGITS], tl.int32)
    for start in range(first, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key, counted = load_ordered(scores_ptr, mask_ptr, token, token < end, HAS_MASK)
        # Where a digit before differs, what is left is more than one digit.
        digit = (key ^ threshold) >> (24 - 8 * level).to(tl.uint32)
        counts += tl.histogram(digit.to(tl.int32), NUM_DIGITS, counted & (digit < NUM_DIGITS))
    tl.store(counts_row(counts_ptr, level, tl.program_id(1)) + tl.arange(0, NUM_DIGITS), counts)


@triton.jit(do_not_specialize=["budget"])
def keep_kernel(
    scores_ptr, mask_ptr, bounds_ptr, ratio_ptr, counts_ptr, state_ptr, kept_ptr, budget,
    HAS_MASK: tl.constexpr, HAS_RATIO: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What is above the threshold, and of what equals it the first."""
    level = tl.full([], NUM_PASSES, tl.int32)
    threshold, remaining, digit = narrow(counts_ptr, state_ptr, ratio_ptr, budget, level, HAS_RATIO)
    program = tl.arange(0, MAX_PROGRAMS)
    ties = counts_row(counts_ptr, level - 1, program) + digit
    num_ties = tl.sum(tl.load(ties, program < tl.program_id(1), 0), 0)  # in the chunks before
    first, end = chunk(bounds_ptr, BLOCK)
    for start in range(first, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < end
        key, counted = load_ordered(scores_ptr, mask_ptr, token, inside, HAS_MASK)
        tied = (counted & (key == threshold)).to(tl.int32)
        is_early = num_ties + tl.cumsum(tied, 0) <= remaining
        kept = (counted & (key > threshold)) | ((tied != 0) & is_early)
        tl.store(kept_ptr + token, kept, inside)
        num_ties += tl.sum(tied, 0)
