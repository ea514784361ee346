"""Whole steps of a larger model, for claims about time and memory of a step.

The model of bench_methods.py (Qwen3, 25M parameters in its layers, V = 32000, float32), two prompts
of 96 tokens and completions of 32, save where said. A seed is a process of its own with prompts and
draws of its own; seconds are those that it had of one core.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from typing import Any, NamedTuple

import torch
from bench_methods import Setting, make_config
from bench_shared_prefix import Case
from measure import count_big_blocks, reset_high_water_mark
from updates import save_model

from fastrl.assembly import build_trainer
from fastrl.methods.needs import requirements
from fastrl.reference import make_reference

PROMPTS, PROMPT_LENGTH, COMPLETION_LENGTH = 2, 96, 32
NUM_STEPS = 4  # the first is not timed, the last is weighed


class Steps(NamedTuple):
    """A setting of bench_methods.py with its number of prompts and what else differs."""

    setting: Setting
    num_prompts: int
    changes: dict[str, Any]


def _steps(method: str, num_generations: int, num_prompts: int = PROMPTS, *,
           options: dict[str, Any] | None = None, **changes: Any) -> Steps:  # fmt: skip
    return Steps(Setting("", method, num_generations, options or {}), num_prompts, changes)


RAPID = {"objective": {"surrogate": "truncated_importance", "epsilon_low": 1.0,
                       "epsilon_high": 1.0}}  # fmt: skip
STEPS = {
    "GRPO, G=8": _steps("grpo", 8),
    "PPO, value head, G=8": _steps("ppo", 8),
    "PPO, value model, G=8": _steps("ppo", 8, options={"critic": "model"}),
    "REBEL, G=2": _steps("rebel", 2),
    "A*-PO, G=1": _steps("astar_po", 1),
    "D3S, G=8": _steps("d3s", 8, options={"objective": {"parameters": {"num_kept": 4}}}),
    "RAPID, G=8": _steps("grpo", 8, 4 * PROMPTS, options=RAPID, num_mini_batches=4),
    "SFPO, G=8": _steps("sfpo", 8),
    "SPO, G=1, as many completions": _steps("spo_single_stream", 1, 8 * PROMPTS),
    "T-PPO, value head, G=8": _steps("t_ppo", 8),
}


def describe(name: str, quick: bool) -> dict[str, Any]:
    """All that the cost depends on."""
    steps = STEPS[name]
    sizes = [steps.num_prompts, PROMPT_LENGTH, COMPLETION_LENGTH, NUM_STEPS]
    return {"quick": quick, "sizes": sizes, "changes": steps.changes, **steps.setting._asdict()}


def step_cost(name: str, seed: int, quick: bool = False) -> dict[str, Any]:
    """Seconds of one core and completions of the timed steps; the most memory of the last step."""
    torch.set_num_threads(1)
    steps = STEPS[name]
    lengths = (48, 8) if quick else (PROMPT_LENGTH, COMPLETION_LENGTH)
    case = Case(steps.num_prompts, *lengths, steps.setting.num_generations)
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, quick)
        config = make_config(steps.setting, case, directory, NUM_STEPS)
        config = dataclasses.replace(config, seed=seed, **steps.changes)
        if steps.setting.method == "t_ppo":  # half of what its completions may have
            half = case.num_prompts * case.num_generations * case.completion_length // 2
            rollout = dataclasses.replace(config.rollout, max_tokens_per_step=half)
            config = dataclasses.replace(config, rollout=rollout)
        before = reset_high_water_mark()
        trainer = build_trainer(config)
        if "ref_logps" in requirements(trainer.method):
            trainer.reference = make_reference(trainer.policy, "auto")
        if trainer.sampler.values is not None:
            trainer.sampler.values.prepare()
        seconds, completions = [], 0
        for step in range(NUM_STEPS):
            if step == NUM_STEPS - 1:
                count_big_blocks()
                reset_high_water_mark()
                trainer.memory.restart()
            began = time.process_time()
            output = trainer.train_step(step)
            if 0 < step < NUM_STEPS - 1:
                seconds.append(time.process_time() - began)
                completions += len(output.sampled.everything.rollouts.completion_ids)
        peak = trainer.memory.highest - before
    return {"setting": name, "seed": seed, "case": str(case), "seconds": seconds,
            "completions": completions, "peak_bytes": peak}  # fmt: skip
