"""What a run leaves behind of a batch that it could not learn from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastrl.trainer import Trainer


def save_batch(directory: Path, trainer: Trainer) -> Path:
    """Write the completions of the last step that was trained on; returns where to.

    batch.safetensors has token ids and log-probabilities, one completion after the other, with
    lengths and rewards; completions.jsonl has the same in words. A score that is not finite is
    infinite in its part, and in no total.
    """
    sampled = trainer.last_sampled
    assert sampled is not None, "no step has sampled anything yet"
    rollouts, texts, rewards = sampled.trained
    target = directory / "not_finite"
    target.mkdir(parents=True, exist_ok=True)
    prompts = rollouts.prompts
    tensors = {
        "prompt_ids": torch.cat(prompts.token_ids),
        "prompt_lengths": torch.tensor([len(ids) for ids in prompts.token_ids]),
        "completion_ids": torch.cat(rollouts.completion_ids),
        "completion_lengths": rollouts.lengths,
        "finished": rollouts.finished,
        "rewards": rewards.total,
        **{f"rewards/{name}": part for name, part in rewards.parts.items()},
    }
    if rollouts.rollout_logps is not None:
        tensors["rollout_logps"] = torch.cat(rollouts.rollout_logps)
    save_file({name: x.cpu().contiguous() for name, x in tensors.items()},
              target / "batch.safetensors")  # fmt: skip
    G = rollouts.num_generations
    with (target / "completions.jsonl").open("w", encoding="utf-8") as file:
        for b, text in enumerate(texts):
            row = {
                "prompt": prompts.examples[b // G].prompt,
                "completion": text,
                "reward": float(rewards.total[b]),
                "rewards": {name: _said(float(part[b])) for name, part in rewards.parts.items()},
                "finished": bool(rollouts.finished[b]),
            }
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return target


def _said(score: float) -> float | str | None:
    """JSON has no NaN and no infinity."""
    if math.isinf(score):
        return "not finite"
    return None if math.isnan(score) else score
