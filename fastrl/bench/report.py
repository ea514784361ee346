"""What was found out, as tables for a reader and as a record for JSON."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastrl.bench.recommend import MODE_HEADER, Recommendation, mode_rows, recommend
from fastrl.bench.rows import HEADER, notes, table
from fastrl.bench.run import Result
from fastrl.bench.setup import Setup
from fastrl.installed import versions_of
from fastrl.memory.plan import gib

PrintTable = Callable[..., None]
PACKAGES = ("fastrl-llm", "torch", "triton", "transformers", "peft", "liger-kernel")
ALWAYS_ON = (
    "the fused loss, packed rows, shared prefixes and sparse heads are always on: no setting"
)


def report(result: Result, print_table: PrintTable) -> dict[str, Any]:
    """Print it all; returns the record. print_table: (header, rows, title=)."""
    setup = result.setup
    recommendation = recommend(
        setup.request, setup.blueprint, setup.rows, setup.layout.max_tokens_per_pass
    )
    where = environment(setup.device)
    print(f"{where['device']}, {where['num_threads']} threads, torch {where['torch']}")
    print_table(HEADER, table(setup.rows), title=_title(setup))
    for line in [*_legend(setup), *notes(setup.rows), *setup.remarks]:
        print(line)
    print_table(MODE_HEADER, mode_rows(setup.blueprint), title="precision and optimizer, not run")
    _print_recommendation(recommendation, setup)
    return {
        "environment": where,
        "workload": _workload(setup),
        "floor_ms": result.floor_ms,
        "techniques": [row.as_record() for row in setup.rows],
        "remarks": setup.remarks,
        "modes": [dict(zip(MODE_HEADER, row, strict=True)) for row in mode_rows(setup.blueprint)],
        "recommended": None if recommendation is None else recommendation._asdict(),
    }


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers depend on besides the request."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "num_threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "command": " ".join(["fastrl", *sys.argv[1:]]),
        **versions_of(PACKAGES),
    }


def _print_recommendation(found: Recommendation | None, setup: Setup) -> None:
    if found is None:
        print("nothing to recommend: no technique of `fastrl train` was measured and correct")
        return
    if not found.fits:
        limit = gib(setup.request.memory_limit or 0)
        print(f"nothing stays within {limit} GiB; this takes the least:")
    print(f"recommended ({ALWAYS_ON}):")
    for line in found.reasons:
        print(f"  {line}")
    if setup.request.directory is None and not setup.request.config.model.architecture:
        print("  model.path: not set, as there are no weights; give it a model's directory")
    print(f"\n{found.toml}", end="")


def _title(setup: Setup) -> str:
    config = setup.request.config
    lengths = setup.work.rollouts.lengths
    return (
        f"{setup.blueprint.num_parameters / 1e6:.3g}M parameters, {config.model.precision}; "
        f"{config.prompts_per_step} prompts of {config.rollout.max_prompt_length} tokens, "
        f"{config.rollout.num_generations} completions each of {int(lengths.min())} to "
        f"{int(lengths.max())}, {int(lengths.sum())} in all"
    )


def _legend(setup: Setup) -> list[str]:
    dropped = len(setup.work.kept) - int(setup.work.kept.sum())
    return [
        "one update: forward, loss and backward of all passes; tokens/s counts completions",
        f"sparse heads leave out {dropped} of {len(setup.work.kept)} completions "
        f"({setup.work.method}: no gradient)",
        "% of floor: bare matrix products of the last shapes, in this run; peak: beyond weights "
        "and gradients; with states: all, and float32 AdamW",
    ]


def _workload(setup: Setup) -> dict[str, Any]:
    config, request = setup.request.config, setup.request
    return {
        "num_parameters": setup.blueprint.num_parameters,
        "num_trained": setup.blueprint.num_trained,
        "has_random_weights": request.directory is None,
        "precision": config.model.precision,
        "prompts": config.prompts_per_step,
        "prompt_length": config.rollout.max_prompt_length,
        "completion_length": config.rollout.max_completion_length,
        "num_generations": config.rollout.num_generations,
        "is_fixed_length": request.is_fixed_length,
        "zero_spread": request.zero_spread,
        "method": setup.work.method,
        "num_completion_tokens": setup.work.num_tokens,
        "max_tokens_per_pass": setup.layout.max_tokens_per_pass,
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()
