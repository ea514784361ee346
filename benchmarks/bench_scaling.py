"""Time and memory of our update as sizes grow, one at a time, with the exponents that fit them.

python benchmarks/bench_scaling.py [--quick] [--json PATH] [--only S V D P R G]

An update is that of bench_shared_prefix.py: forward with each prompt once, head and policy loss,
backward, clipping and AdamW. Sizes: S trained tokens (by the number of prompts), V vocabulary, D
hidden, P prompt tokens, R completion tokens, G completions of a prompt; the others stay as in BASE.
Memory is that beyond weights, gradients and optimizer states. An exponent is the slope of the
logarithm against that of the size by least squares, with its standard error: 1 is proportional.
Before anything is timed, gradients are compared with one sequence after the other in float64.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_shared_prefix import (
    MAX_ERROR,
    OBJECTIVE,
    Case,
    Group,
    make_groups,
    make_trained,
    row_states,
    shared_states,
)
from compare import exit_status
from measure import in_fresh_process, peak_on_cpu, quantiles, time_on_cpu
from rows import MIB, OURS, Row, environment, print_table, write_json
from transformers import AutoModelForCausalLM, Qwen3Config

from fastrl_kernels import LMHead, policy_loss

NUM_LAYERS, NUM_ROUNDS = 4, 5


class Sizes(NamedTuple):
    """Of one update."""

    prompts: int
    vocabulary: int
    hidden: int
    prompt_length: int
    completion_length: int
    num_generations: int

    def __str__(self) -> str:
        trained = self.prompts * self.num_generations * self.completion_length
        return (
            f"S={trained} V={self.vocabulary} D={self.hidden} P={self.prompt_length} "
            f"R={self.completion_length} G={self.num_generations}"
        )


class Measured(NamedTuple):
    """Of one process."""

    milliseconds: list[float]
    peak_bytes: int


class Fit(NamedTuple):
    """y ~ x ** exponent."""

    exponent: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} +- {self.standard_error:.2f}"


BASE = Sizes(1, 8000, 256, 256, 64, 8)
TINY = Sizes(1, 500, 64, 32, 8, 2)
AXES = {
    "S": ("prompts", (1, 2, 3, 4, 6)),
    "V": ("vocabulary", (8000, 16000, 32000, 64000, 128000)),
    "D": ("hidden", (128, 256, 384, 512, 768)),
    "P": ("prompt_length", (256, 512, 1024, 2048, 4096)),
    "R": ("completion_length", (32, 64, 128, 256, 512)),
    "G": ("num_generations", (4, 8, 16, 32, 48)),
}


def sizes_of(axis: str, quick: bool) -> list[tuple[int, Sizes]]:
    """What the axis has been set to, and all sizes with it."""
    field, values = AXES[axis]
    base, found = (TINY if quick else BASE), []
    for value in values:
        small = max(value * getattr(TINY, field) // getattr(BASE, field), 1)
        chosen = (small if field != "hidden" else value // 2) if quick else value
        sizes = base._replace(**{field: chosen})
        trained = sizes.prompts * sizes.num_generations * sizes.completion_length
        found.append((trained if axis == "S" else chosen, sizes))
    return found


class Update:
    """A model of these sizes with its groups."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype = torch.float32) -> None:
        config = Qwen3Config(
            hidden_size=sizes.hidden, num_hidden_layers=NUM_LAYERS, head_dim=32,
            intermediate_size=3 * sizes.hidden, num_attention_heads=sizes.hidden // 32,
            num_key_value_heads=max(sizes.hidden // 64, 1), vocab_size=sizes.vocabulary,
            tie_word_embeddings=True, max_position_embeddings=8192,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        self.model: Any = model.to(dtype).train()
        self.set_groups(make_groups(Case(sizes.prompts, *sizes[3:]), sizes.vocabulary))
        # At a learning rate of 0 the optimizer does all its work and the weights stay.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def set_groups(self, groups: list[Group]) -> None:
        """What to train on."""
        self.groups, self.trained = groups, make_trained(groups, self.model)

    def backward(self, one_by_one: bool = False) -> None:
        """Gradients are added to the parameters'."""
        states_of = row_states if one_by_one else shared_states
        for states, part in states_of(self.model, self.groups):
            ids, advantages, weights = (x[part] for x in self.trained)
            head = LMHead.from_model(self.model)
            policy_loss(
                states, head, ids, advantages, weights, objective=OBJECTIVE
            ).loss.backward()  # fmt: skip

    def step(self) -> None:
        """One update; gradients stay in memory, as zeros."""
        self.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=False)

    def gradients(self, one_by_one: bool) -> list[torch.Tensor]:
        """Of every parameter."""
        self.model.zero_grad()
        self.backward(one_by_one)
        return [p.grad.double() for p in self.model.parameters() if p.grad is not None]


def measure(sizes: Sizes) -> Measured:
    """Time first: what memory is measured with takes time."""
    update = Update(sizes)
    time_on_cpu(update.step)
    times = [time_on_cpu(update.step) for _ in range(NUM_ROUNDS)]
    return Measured(times, peak_on_cpu(update.step, lambda: None))


def error_of(sizes: Sizes) -> float:
    """Largest error of a gradient relative to the largest value of its tensor."""
    truth = Update(sizes, torch.float64).gradients(one_by_one=True)
    pairs = zip(Update(sizes).gradients(one_by_one=False), truth, strict=True)
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """Least squares through the logarithms; at least three points."""
    x, y = ([math.log(value) for value in group] for group in (sizes, values))
    center_x, center_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - center_x) ** 2 for a in x)
    slope = sum((a - center_x) * (b - center_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - center_y - slope * (a - center_x)) ** 2 for a, b in zip(x, y, strict=True))
    return Fit(slope, math.sqrt(rest / (len(x) - 2) / spread))


def rows_of(axis: str, found: list[tuple[int, Sizes, Measured]], error: float) -> list[Row]:
    """A row for each size; the exponents are said by the last."""
    where, rows = environment("cpu"), []
    medians = [quantiles(measured.milliseconds).p50 for _, _, measured in found]
    peaks = [measured.peak_bytes for _, _, measured in found]
    values = [value for value, _, _ in found]
    exponents = f"time ~ {axis}^({fit(values, medians)}), memory ~ {axis}^({fit(values, peaks)})"
    for index, (value, sizes, measured) in enumerate(found):
        times = quantiles(measured.milliseconds)
        rows.append(
            Row(
                case=f"scaling {axis}={value}", implementation=f"{OURS} update, {sizes}",
                correct=error <= MAX_ERROR, environment=where, p20_ms=times.p20,
                p50_ms=times.p50, p80_ms=times.p80, peak_bytes=measured.peak_bytes,
                weight_grad_error=error, note=exponents if index == len(found) - 1 else "",
            )
        )  # fmt: skip
    return rows


def main() -> int:
    """Prints times, memory and exponents; 1 where gradients are not correct."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here, after every axis")
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES))
    args = parser.parse_args()
    error = error_of(TINY if args.quick else BASE._replace(vocabulary=2000, num_generations=4))
    known: dict[Sizes, Measured] = {}
    rows: list[Row] = []
    for axis in args.only:
        found = []
        for value, sizes in sizes_of(axis, args.quick):
            known[sizes] = known.get(sizes) or in_fresh_process(measure, sizes)
            found.append((value, sizes, known[sizes]))
        new = rows_of(axis, found, error)
        if new[0].correct:
            for row in new:
                print(f"{row.case}: {row.p50_ms:.1f} ms, {(row.peak_bytes or 0) / MIB:.1f} MiB")
            print(f"{new[-1].note}\n", flush=True)
        else:
            print_table(new)
        rows += new
        write_json(args.json, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
