"""Are the fast paths still faster? Each against the slow one, in one run; 1 where one is not.

python benchmarks/speed_gate.py [--only TEXT] [--json PATH]

What counts is CPU time of this process on one thread, not the wall clock: a neighbour on the
machine takes the clock's time, but hardly a thread's own. The sides take turns, and only the ratio
of their medians is looked at, which another machine shares more or less. A pair that falls short
is measured once more, with twice as many rounds, before it counts as lost. `least` is well below
what is measured (at most half of what is gained), so that it trips when a path is lost, not when
it is a little slower; benchmarks are for that.

S tokens, V vocabulary, D hidden; P prompt tokens, R completion tokens, G completions of a prompt.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from attention_cases import AttentionCase, Group
from attention_cases import prepare as prepare_attention
from bench_shared_prefix import Case, Work
from cases import policy_step
from implementations import fastrl_policy_loss
from inputs import Shape, make_inputs
from measure import Step, Timing, quantiles
from rows import OURS, Row, environment, write_json

NUM_ROUNDS = 9
TOLERANCE = 1e-3  # of losses in float32, relative
WIDE = Shape(1024, 32768, 32, torch.float32, "cpu")  # logits outweigh the products
DEEP = Shape(1024, 8192, 512, torch.float32, "cpu")  # and the other way round


class Side(NamedTuple):
    """One way to a result; a call returns its loss, or None where the pair's losses differ."""

    name: str
    step: Callable[[], float | None]


class Pair(NamedTuple):
    """Two ways, and the least number of times that the first must be faster."""

    name: str
    make: Callable[[], tuple[Side, Side]]
    least: float


class Verdict(NamedTuple):
    """Milliseconds of CPU time of every round, and what they amount to."""

    fast: list[float]
    slow: list[float]
    speedup: float
    agree: bool


def fused_loss() -> tuple[Side, Side]:
    """policy_loss against logits, log-softmax and autograd."""
    inputs = make_inputs(WIDE)
    fast = policy_step(fastrl_policy_loss("cpu"), inputs)
    slow = policy_step(peers.naive_policy_loss, inputs)
    return (
        Side(f"{OURS} policy_loss", lambda: float(fast().loss)),
        Side("naive", lambda: float(slow().loss)),
    )


def sparse_loss() -> tuple[Side, Side]:
    """policy_loss with a gradient in a fifth of the tokens against all of them; losses differ."""
    sides = []
    for name, share in (("a fifth of the tokens", 0.2), ("all tokens", 1.0)):
        step = policy_step(fastrl_policy_loss("cpu"), make_inputs(DEEP, share_trained=share))
        sides.append(Side(f"{OURS} policy_loss, {name}", functools.partial(without_loss, step)))
    return sides[0], sides[1]


def without_loss(step: Step) -> None:
    """The step, for its time alone."""
    step()


def shared_update() -> tuple[Side, Side]:
    """Forward and backward of a small model, the prompt once against one padded row each."""
    work = Work(Case(1, 512, 32, 8), quick=True)
    return update_side(work, f"{OURS} shared prefix"), update_side(work, "padded rows")


def packed_update() -> tuple[Side, Side]:
    """The same of ragged completions, packed (no prompt shared) against padded."""
    work = Work(Case(4, 64, 256, 8, is_ragged=True), quick=True)
    return update_side(work, "packed rows"), update_side(work, "padded rows")


def update_side(work: Work, name: str) -> Side:
    """Loss and gradients."""

    def step() -> float:
        loss, _ = work.backward(name)
        work.model.zero_grad(set_to_none=True)
        return loss

    return Side(name, step)


def shared_attention() -> tuple[Side, Side]:
    """segment_attention, forward and backward, against PyTorch's on G rows; the sum of outputs."""
    names = f"{OURS} segment_attention", "sdpa, repeated rows"
    group = Group(512, 32, 8, 4, 2, 32, torch.float32, "cpu")
    steps = prepare_attention(AttentionCase("attention", group), kept=set(names)).steps

    def side(name: str) -> Side:
        def step() -> float:
            result = steps[name]()
            return float(result.packed(result.out, is_sum=False).square().sum())

        return Side(name, step)

    return side(names[0]), side(names[1])


PAIRS = (
    Pair("fused against naive", fused_loss, 1.12),
    Pair("sparse against dense", sparse_loss, 1.3),
    Pair("shared against padded", shared_update, 2.0),
    Pair("shared against padded attention", shared_attention, 1.5),
    Pair("packed against padded", packed_update, 1.3),
)


def compare(sides: tuple[Side, Side], num_rounds: int) -> Verdict:
    """Both sides in turns, one of them warm-up; the second side is first in every other round."""
    losses = [side.step() for side in sides]
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(num_rounds):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            start = time.process_time()
            sides[which].step()
            times[which].append(1000 * (time.process_time() - start))
    fast, slow = losses
    agree = fast is None or slow is None or abs(fast - slow) <= TOLERANCE * max(abs(slow), 1e-6)
    speedup = quantiles(times[1]).p50 / quantiles(times[0]).p50
    return Verdict(*times, speedup=speedup, agree=agree)


def judge(pair: Pair, sides: tuple[Side, Side], num_rounds: int = NUM_ROUNDS) -> Verdict:
    """What the gate goes by: the first measurement, or a second one where that falls short."""
    verdict = compare(sides, num_rounds)
    if verdict.agree and verdict.speedup < pair.least:
        print(f"{pair.name}: {verdict.speedup:.2f}x falls short of {pair.least:.2f}x; once more")
        verdict = compare(sides, 2 * num_rounds)
    return verdict


def holds(pair: Pair, verdict: Verdict) -> bool:
    """Whether the pair passes."""
    return verdict.agree and verdict.speedup >= pair.least


def report(pair: Pair, sides: tuple[Side, Side], verdict: Verdict) -> str:
    """One line where the pair holds; both sides with all their rounds where it does not."""
    if not verdict.agree:
        names = " and ".join(side.name for side in sides)
        return f"WRONG {pair.name}: the losses of {names} differ; no times are compared"
    told = f"{pair.name}: {verdict.speedup:.2f}x (at least {pair.least:.2f}x)"
    if holds(pair, verdict):
        return f"ok    {told}"
    lines = [f"LOST  {told}"]
    for side, times in zip(sides, (verdict.fast, verdict.slow), strict=True):
        spread = " to ".join(f"{value:.1f}" for value in (min(times), max(times)))
        lines.append(f"  {side.name}: median {quantiles(times).p50:.1f} ms, {spread}; rounds:")
        lines.append("    " + " ".join(f"{value:.1f}" for value in times))
    return "\n".join(lines)


def rows_of(pair: Pair, sides: tuple[Side, Side], verdict: Verdict) -> list[Row]:
    """Both sides as results."""
    times: list[Timing] = [quantiles(verdict.fast), quantiles(verdict.slow)]
    return [
        Row(
            case=pair.name, implementation=side.name, correct=verdict.agree,
            environment=environment("cpu"), p20_ms=timing.p20, p50_ms=timing.p50,
            p80_ms=timing.p80, note=f"{len(verdict.fast)} rounds, CPU time",
        )
        for side, timing in zip(sides, times, strict=True)
    ]  # fmt: skip


def main(arguments: list[str] | None = None, pairs: tuple[Pair, ...] = PAIRS) -> int:
    """1 where a pair does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="pairs whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the rows here, after every pair")
    args = parser.parse_args(arguments)
    chosen = [pair for pair in pairs if args.only in pair.name]
    if not chosen:
        names = ", ".join(pair.name for pair in pairs)
        parser.error(f"no pair has {args.only!r} in its name; there are: {names}")
    torch.set_num_threads(1)
    rows: list[Any] = []
    passed = True
    for pair in chosen:
        sides = pair.make()
        verdict = judge(pair, sides)
        print(report(pair, sides, verdict), flush=True)
        passed = passed and holds(pair, verdict)
        rows += rows_of(pair, sides, verdict)
        write_json(args.json, rows)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
