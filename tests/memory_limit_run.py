"""A run under a real memory limit, and one whose passes were small from the start; tells of both.

Started by tests/test_memory_limit.py in a process of its own: the limit is the process's.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastrl.assembly import build_trainer
from fastrl.config import DataConfig, EvalConfig, RolloutConfig
from fastrl.memory.limit import MemoryLimit, resident_bytes
from fastrl.memory.recovery import is_out_of_memory
from fastrl.report import read_metrics
from fastrl.run import train
from tests.test_training import numbers, tiny_config, weights

MIB, GIB = 2**20, 2**30
REWARD = """
import resource
def unlimited(completions):
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return [float(soft == resource.RLIM_INFINITY) for _ in completions]
def checksum(completions):
    return [sum(map(ord, completion)) % 7 / 6 for completion in completions]
"""


def fails(make: Callable[[], object]) -> bool:
    """Whether there is no memory for it; another failure is an error."""
    try:
        make()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False


def ones(mib: int) -> torch.Tensor:
    """So much of torch's memory, in use."""
    return torch.ones(mib * MIB, dtype=torch.uint8)


def beyond_a_limit() -> dict[str, Any]:
    """Allocations of every kind, with 200 MiB to go."""
    limit = resident_bytes() + 200 * MIB
    with MemoryLimit(limit, torch.device("cpu")).kept():
        kept = ones(100)
        within = {
            "large": fails(lambda: ones(120)),
            "python": fails(lambda: bytearray(120 * MIB)),
            "small": fails(lambda: [torch.ones(1000) for _ in range(50_000)]),
            "fits": fails(lambda: ones(10)),
        }
        child = os.fork()
        if child == 0:
            os._exit(fails(lambda: ones(300)))
        status = os.waitpid(child, 0)[1]
        excess = (resident_bytes() - limit) / MIB
        del kept
    return {
        "fails_within": within,
        "fails_in_child": bool(status),
        "fails_afterwards": fails(lambda: ones(300)),
        "excess_mib": excess,
    }


def main(directory: Path) -> None:
    """A limit between what a step takes in one pass, 230 MiB, and in two."""
    beyond = beyond_a_limit()
    (directory / "reward.py").write_text(REWARD, encoding="utf-8")
    base = tiny_config("")
    architecture = {
        **base.model.architecture, "hidden_size": 128, "intermediate_size": 512,
        "num_hidden_layers": 4, "head_dim": 32, "max_position_embeddings": 256,
    }  # fmt: skip
    config = dataclasses.replace(
        base,
        output_dir=str(directory / "limited"),
        max_steps=1,
        max_tokens_per_pass=1 << 16,
        workspace_mb=16,
        prompts_per_step=2,
        reward_workers=1,
        rewards=tuple(f"{directory / 'reward.py'}:{name}" for name in ("unlimited", "checksum")),
        warm_start=dataclasses.replace(base.warm_start, steps=0),
        data=DataConfig(eval_size=1),
        eval=EvalConfig(num_samples=1),
        model=dataclasses.replace(base.model, architecture=architecture),
        rollout=RolloutConfig(num_generations=24, max_prompt_length=48, max_completion_length=64),
    )
    build_trainer(dataclasses.replace(config, reward_workers=0))  # all is imported
    gc.collect()
    limit = resident_bytes() + 160 * MIB
    train(dataclasses.replace(config, memory_limit=f"{limit / MIB:.0f}MiB"))
    (row,) = [row for row in read_metrics(directory / "limited") if "loss" in row]
    small = int(row["memory/max_tokens_per_pass"])
    sizes = {"max_tokens_per_pass": small, "output_dir": str(directory / "small")}
    train(dataclasses.replace(config, **sizes))  # type: ignore[arg-type]
    mine, others = (weights(directory / name) for name in ("limited", "small"))
    found = {
        **beyond,
        "failures": row["memory/oom"],
        "passes": row["packing/passes"],
        "same_metrics": numbers(directory / "limited") == numbers(directory / "small"),
        "same_weights": all(torch.equal(mine[name], others[name]) for name in mine),
        "limit_mib": limit / MIB,
        "peak_mib": row["memory/train_gib"] * GIB / MIB,
        "unlimited_workers": row["rewards/unlimited/mean"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
