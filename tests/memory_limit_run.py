"""A run under a real memory limit, and one whose passes were small from the start; tells of both.

Started by tests/test_memory_limit.py in a process of its own: the limit is the process's.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from fastrl.assembly import build_trainer
from fastrl.config import DataConfig, EvalConfig, RolloutConfig
from fastrl.memory.limit import resident_bytes
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


def main(directory: Path) -> None:
    """A limit between what a step takes in one pass, 230 MiB, and in two."""
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
    limit = resident_bytes() + 180 * MIB
    train(dataclasses.replace(config, memory_limit=f"{limit / MIB:.0f}MiB"))
    (row,) = [row for row in read_metrics(directory / "limited") if "loss" in row]
    small = int(row["memory/max_tokens_per_pass"])
    sizes = {"max_tokens_per_pass": small, "output_dir": str(directory / "small")}
    train(dataclasses.replace(config, **sizes))  # type: ignore[arg-type]
    mine, others = (weights(directory / name) for name in ("limited", "small"))
    found = {
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
