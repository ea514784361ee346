"""What the field claims, and the methods that the claims are tried with on the demo task.

Every method begins with the same warm-started policy of the demo and meets the same number of
completions between two updates, save where the claim is about just that; what differs from
examples/demo.toml is here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.config import Config
from fastrl.config_io import load_config

DEMO = Path(__file__).parent.parent / "examples" / "demo.toml"
SEEDS = (0, 1, 2, 3, 4)
COMPLETIONS = 1024  # of a step
NUM_STEPS, EVAL_STEPS = 240, 20
GROUP = {"rollout.num_generations": 8, "prompts_per_step": COMPLETIONS // 8}
HALF = {"max_steps": NUM_STEPS // 2, "eval.eval_steps": EVAL_STEPS // 2}
"""Of those whose steps take two to four times as long."""
SINGLE = {"rollout.num_generations": 1, "prompts_per_step": COMPLETIONS,
          "max_tokens_per_pass": 2048, **HALF}  # fmt: skip
CRITIC = {
    "objective": {
        "reward_shaping": "none", "epsilon_high": 0.28,
        "parameters": {"gae_lambda": 1.0, "value_lambda": 1.0, "critic_learning_rate": 1e-2},
    },
}  # fmt: skip


class Learner(NamedTuple):
    """A method with what differs from the others; keys with a dot are of a table."""

    method: str
    changes: dict[str, Any]
    said: str
    """How it was set, for the table."""


LEARNERS = {
    "GRPO": Learner(
        "grpo",
        {**GROUP, "objective": {"aggregation": "token_mean", "epsilon_high": 0.28}},
        "128 prompts, G = 8, clip-higher, token mean",
    ),
    "PPO": Learner("ppo", {**GROUP, **CRITIC}, "128 prompts, G = 8, value head"),
    "REBEL": Learner(
        "rebel",
        {"rollout.num_generations": 2, "prompts_per_step": COMPLETIONS // 2, "objective": {}},
        "512 prompts, 2 completions",
    ),
    "A*-PO": Learner(
        "astar_po",
        {**SINGLE, "objective": {"entropy_coef": 0.0}},
        "1024 prompts, 1 completion, 8 reference completions a prompt beforehand",
    ),
    "D3S": Learner("d3s", {**GROUP, "objective": {"parameters": {"num_kept": 4}}},
                   "128 prompts, G = 8, of which 4 and in the batch a fourth to half are kept"),
    "RAPID": Learner(
        "rapid",
        {
            "rollout.num_generations": 8, "prompts_per_step": 4 * COMPLETIONS // 8,
            "num_mini_batches": 4, "max_steps": NUM_STEPS // 4, "eval.eval_steps": EVAL_STEPS // 4,
            "optim.warmup_steps": 3,
            "objective": {},
        },
        "512 prompts, G = 8, in 4 mini-batches, truncated importance [0, 2]",
    ),
    "SFPO": Learner(
        "sfpo",
        {**GROUP, **HALF,
         "objective": {"aggregation": "token_mean", "epsilon_high": 0.28}},
        "GRPO with 3 fast steps, 0.8 of the way back, 1 slow step; half as many rollouts",
    ),
    "SPO": Learner(
        "spo_single_stream",
        {**SINGLE, "objective": {}},
        "1024 prompts, 1 completion, 8 reference completions a prompt beforehand",
    ),
    "T-PPO": Learner(
        "t_ppo",
        {**GROUP, "rollout.max_tokens_per_step": 2 * COMPLETIONS,
         "objective": {"epsilon_high": 0.28,
                       "parameters": {"gae_lambda": 1.0, "critic_learning_rate": 1e-2}}},
        "PPO whose step samples at most 2048 tokens; what they cut goes on in the next",
    ),
}  # fmt: skip


class Claim(NamedTuple):
    """What is claimed, and what to compare: the first learner is what others are compared with."""

    title: str
    said: str
    learners: tuple[str, ...]
    settings: tuple[str, ...] = ()
    """Of steps of the larger model, see headline_steps.py."""


CLAIMS = {
    "astar_po": Claim(
        "A*-PO (arXiv:2505.20686)",
        "up to 2x less training time and over 30% less peak memory than PPO, GRPO and REBEL",
        ("GRPO", "PPO", "REBEL", "A*-PO"),
        ("GRPO, G=8", "PPO, value model, G=8", "REBEL, G=2", "A*-PO, G=1"),
    ),
    "prefix_grouper": Claim(
        "Prefix Grouper (arXiv:2506.05433)",
        "the same outputs and gradients as with repeated prompts, at a much lower cost, above all "
        "with long prompts, and larger groups for the same compute",
        (),
    ),
    "d3s": Claim(
        "D3S (arXiv:2509.22115)",
        "better accuracy and generalisation with fewer samples and tokens",
        ("GRPO", "D3S"),
        ("GRPO, G=8", "D3S, G=8"),
    ),
    "rapid": Claim(
        "RAPID (arXiv:2510.03515)",
        "11% to 34% less running time at the same or better accuracy",
        ("GRPO", "RAPID"),
        ("GRPO, G=8", "RAPID, G=8"),
    ),
    "sfpo": Claim(
        "SFPO (arXiv:2510.04072)",
        "up to 4.93x fewer rollouts and 4.19x less time to the best accuracy of GRPO",
        ("GRPO", "SFPO"),
        ("GRPO, G=8", "SFPO, G=8"),
    ),
    "spo": Claim(
        "Single-stream PO (arXiv:2509.13232)",
        "without groups higher accuracy than GRPO (3.4 points of maj@32 with Qwen3-8B), and no "
        "compute on groups that teach nothing",
        ("GRPO", "SPO"),
        ("GRPO, G=8", "SPO, G=1, as many completions"),
    ),
    "t_ppo": Claim(
        "T-PPO (arXiv:2506.15050)",
        "up to 2.5x the training efficiency of PPO",
        ("PPO", "T-PPO"),
        ("PPO, value head, G=8", "T-PPO, value head, G=8"),
    ),
}


def config_of(name: str, seed: int, directory: Path) -> Config:
    """The demo, shortened, with what the learner changes."""
    learner, demo = LEARNERS[name], load_config(DEMO)
    config = dataclasses.replace(
        demo, method=learner.method, seed=seed, max_steps=NUM_STEPS, num_iterations=1,
        reward_workers=0, output_dir=str(directory), values_dir=str(directory / "values"),
        optim=dataclasses.replace(
            demo.optim, lr_scheduler_type="constant", warmup_steps=12, learning_rate=7e-4
        ),
        eval=dataclasses.replace(demo.eval, eval_steps=EVAL_STEPS, num_samples=8),
    )  # fmt: skip
    for key, value in learner.changes.items():
        table, _, field = key.rpartition(".")
        if table:
            inner = dataclasses.replace(getattr(config, table), **{field: value})
            config = dataclasses.replace(config, **{table: inner})
        else:
            config = dataclasses.replace(config, **{field: value})
    return config
