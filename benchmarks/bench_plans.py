"""What a plan takes to build, from lists of token vectors to the tables of the attention kernels.

python benchmarks/bench_plans.py [--quick] [--json PATH] [--csv PATH] [--device cpu|cuda]
    [--only TEXT ...]

Rows of about 65536 packed tokens. "fastrl, all" is everything a pass needs before its first kernel:
the plan, its way to the device and the tables of attention for one kind of layer. The other rows
are its parts, timed alone. Wall clock, the device waited for.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from compare import device_is_there
from measure import Step, time_interleaved
from rows import Row, environment, print_table
from suite import SuiteCase, make_parser, run_suite
from torch import Tensor

from fastrl.packing import Plan, pack, pack_segments, pack_tree
from fastrl_kernels.segment_attention.tiles import Sizes, make_tiles
from fastrl_kernels.segments import make_segments

# Of a model with 16 query and 8 key heads of 128 on a GPU with 132 processors.
SIZES = Sizes(
    window=None, num_groups=2, num_kv_heads=8, query_tile=64, key_tile=64, query_step=32,
    num_programs=6 * 132,
)  # fmt: skip


class Case(NamedTuple):
    """A row to build, and for each of its completions the tokens and how many are not trained."""

    name: str
    build: Callable[[], Plan]
    sequences: list[tuple[Tensor, int]]


def make_cases(scale: int) -> list[Case]:
    """The rows; scale 1 is the full size, 8 an eighth of it."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        return torch.randint(3, 150_000, (length,), generator=generator)

    return [
        group_case(ids, num_prompts=64 // scale, num_generations=16, prompt=64, completion=60),
        group_case(ids, num_prompts=4, num_generations=8, prompt=8192 // scale,
                   completion=1024 // scale),
        tree_case(ids, generator, num_sequences=256 // scale),
        segments_case(ids, num_segments=2000 // scale),
    ]  # fmt: skip


def group_case(
    ids: Callable[[int], Tensor], *, num_prompts: int, num_generations: int, prompt: int,
    completion: int,
) -> Case:  # fmt: skip
    """Prompts with completions of lengths around the given one."""
    prompts = [ids(prompt) for _ in range(num_prompts)]
    spread = [completion - 10 + 20 * g // num_generations for g in range(num_generations)]
    completions = [[ids(length) for length in spread] for _ in prompts]
    rows = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    return Case(
        f"pack, {num_prompts} prompts of {prompt} x {num_generations} of about {completion}",
        lambda: pack(prompts, completions),
        [(torch.cat(row), len(row[0])) for row in rows],
    )


def tree_case(
    ids: Callable[[int], Tensor], generator: torch.Generator, *, num_sequences: int
) -> Case:
    """Sequences that each continue an earlier one from somewhere in its second half."""
    sequences, tail = [ids(400)], 250
    for _ in range(num_sequences - 1):
        before = sequences[int(torch.randint(len(sequences), (), generator=generator))]
        half = len(before) // 2
        cut = half + int(torch.randint(half, (), generator=generator))
        sequences.append(torch.cat([before[:cut], ids(tail)]))
    masks = [torch.arange(len(tokens)) >= len(tokens) - tail for tokens in sequences]
    return Case(
        f"pack_tree, {num_sequences} sequences with {tail} tokens of their own",
        lambda: pack_tree(sequences, masks),
        [(tokens, len(tokens) - tail) for tokens in sequences],
    )


def segments_case(ids: Callable[[int], Tensor], *, num_segments: int) -> Case:
    """Roots with 19 children of 32 tokens; all but the first tokens of roots are trained."""
    tokens = [ids(32) for _ in range(num_segments)]
    parents = [-1 if s % 20 == 0 else s - s % 20 for s in range(num_segments)]
    rows = [
        (own, 1) if parent < 0 else (torch.cat([tokens[parent], own]), 32)
        for own, parent in zip(tokens, parents, strict=True)
    ]
    return Case(
        f"pack_segments, {num_segments} segments of 32",
        lambda: pack_segments(tokens, parents),
        rows,
    )


def is_correct(case: Case) -> bool:
    """Whether every trained token is predicted from the token before it, at its position."""
    plan = case.build()
    found = zip(plan.scatter(plan.source_index), plan.scatter(plan.target_ids), strict=True)
    return all(
        torch.equal(targets, tokens[untrained:])
        and torch.equal(plan.input_ids[sources], tokens[untrained - 1 : -1])
        and torch.equal(plan.position_ids[sources], torch.arange(untrained - 1, len(tokens) - 1))
        for (sources, targets), (tokens, untrained) in zip(found, case.sequences, strict=True)
    )


def make_steps(case: Case, device: torch.device) -> dict[str, Step]:
    """Everything, then the parts."""
    plan = case.build()
    segments = plan.segments

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def everything() -> None:
        make_tiles(case.build().to(device).segments, SIZES)
        wait()

    def move() -> None:
        plan.to(device)
        wait()

    moved = plan.to(device).segments

    def tables() -> None:
        make_tiles(moved, SIZES)
        wait()

    return {
        "fastrl, all": everything,
        "fastrl, plan": case.build,
        "fastrl, make_segments alone": lambda: make_segments(segments.lengths, segments.parents),
        "fastrl, to(device)": move,
        "fastrl, attention tables": tables,
    }


def measure(index: int, scale: int, device: str) -> list[Row]:
    """Check and time one row of `make_cases`; printed."""
    case = make_cases(scale)[index]
    correct, plan = is_correct(case), case.build()
    timings = time_interleaved(make_steps(case, torch.device(device)), device="cpu", seconds=2.0)
    name = (
        f"{case.name}: N={len(plan.input_ids)}, S={len(plan.target_ids)}, "
        f"{plan.segments.num_segments} segments"
    )
    where = environment(device)
    rows = [
        Row(name, step, correct, where, p20_ms=t.p20, p50_ms=t.p50, p80_ms=t.p80)
        for step, t in timings.items()
    ]
    print_table(rows)
    return rows


def plan_cases(scale: int, device: str, *, limit: float) -> list[SuiteCase]:
    """All rows, for a suite."""
    return [
        SuiteCase(case.name, functools.partial(measure, index, scale, device), limit, device)
        for index, case in enumerate(make_cases(scale))
    ]


def main() -> int:
    """Print the tables; 1 where a plan is not correct."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small rows, to try the benchmark")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    if not device_is_there(args.device):
        return 2
    return run_suite(plan_cases(8 if args.quick else 1, args.device, limit=300.0), args)


if __name__ == "__main__":
    sys.exit(main())
