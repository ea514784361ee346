"""Rollouts written to disk step by step, for `fastrl.replay`.

A recording is a directory: `recording.json` says what it was made with, `step-N` holds what step N
(counted from 1, as in the logs) sampled: `rollouts.safetensors`, and `completions.jsonl` to read.

Legend: P prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.rollout_tensors import to_tensors
from fastrl.sampler import Scored
from fastrl.types import Rollouts
from fastrl.whole_directory import renamed_when_whole

MANIFEST = "recording.json"
FORMAT = 1


class Vocabulary(Protocol):
    """What is used of a tokenizer."""

    eos_token_id: Any

    def get_vocab(self) -> dict[str, int]: ...


class Recorded(NamedTuple):
    """What one round of a step sampled."""

    rollouts: Rollouts  # all of it, completions that go on in the next step included
    indices: tuple[int, ...]  # P: of the prompts among the task's training examples
    scored: Scored
    scored_prompts: tuple[int, ...]  # the prompts of `scored`, by their place in `rollouts`
    greedy_rewards: Tensor | None = None  # of the prompts of `scored`, where the method asks


class Recorder:
    """Writes the steps of a run; a step is there as a whole or not at all."""

    def __init__(
        self, directory: Path, config: Config, tokenizer: Vocabulary, *, overwrite: bool,
        resume: bool,
    ) -> None:  # fmt: skip
        """overwrite: replace a recording that is there; resume: go on with it."""
        self.directory = directory
        manifest = manifest_of(config, tokenizer)
        if (directory / MANIFEST).is_file():
            if not (overwrite or resume):
                raise InputError(
                    f"{directory} already holds recorded rollouts; give --overwrite or another "
                    "--save-rollouts"
                )
            if resume and read_manifest(directory) != manifest:
                raise InputError(
                    f"{directory} holds the rollouts of another run; give another --save-rollouts"
                )
        elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(
                f"{directory} exists and holds no recorded rollouts; give another --save-rollouts"
            )
        if overwrite:
            for path in directory.glob("step-*"):
                shutil.rmtree(path)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            text = json.dumps(manifest, indent=2) + "\n"
            (directory / MANIFEST).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write rollouts to {directory}: {error.strerror}") from error

    def write(self, step: int, rounds: Sequence[Recorded]) -> None:
        """The rounds of step `step`, counted from 0."""
        tensors: dict[str, Tensor] = {}
        lines: list[str] = []
        for number, recorded in enumerate(rounds):
            found = {
                **to_tensors(recorded.rollouts),
                "indices": torch.tensor(recorded.indices),
                "scored_prompts": torch.tensor(recorded.scored_prompts, dtype=torch.int64),
                "reward": recorded.scored.rewards.total,
                **{f"rewards/{k}": part for k, part in recorded.scored.rewards.parts.items()},
            }
            if recorded.greedy_rewards is not None:
                found["greedy_rewards"] = recorded.greedy_rewards
            tensors |= {f"{number}.{name}": value for name, value in found.items()}
            lines += [json.dumps(line, ensure_ascii=False) for line in _lines(number, recorded)]
        with renamed_when_whole(self.directory / f"step-{step + 1}") as partial:
            save_file(tensors, partial / "rollouts.safetensors")
            text = "".join(f"{line}\n" for line in lines)
            (partial / "completions.jsonl").write_text(text, encoding="utf-8")


def manifest_of(config: Config, tokenizer: Vocabulary) -> dict[str, Any]:
    """What a recording and the run that replays it must have in common."""
    return {
        "format": FORMAT,
        "tokenizer": _fingerprint(tokenizer),
        "prompts_per_step": config.prompts_per_step,
        "rollout.num_generations": config.rollout.num_generations,
        "rollout.max_completion_length": config.rollout.max_completion_length,
        "rollout.max_tokens_per_step": config.rollout.max_tokens_per_step,
        "rollout.temperature": config.rollout.temperature,
        "rewards": [spec.rpartition(":")[2] for spec in config.rewards],
        "reward_weights": list(config.reward_weights or [1.0] * len(config.rewards)),
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """What the recording in a directory was made with."""
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(f"{directory} holds no recorded rollouts: it has no {MANIFEST}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}; record the rollouts again")
    return manifest


def _fingerprint(tokenizer: Vocabulary) -> str:
    """32 letters that stand for a vocabulary and its end."""
    known = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id]
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()


def _lines(number: int, recorded: Recorded) -> list[dict[str, Any]]:
    """One record for each completion that was scored."""
    rollouts, texts, rewards = recorded.scored
    found = []
    for row, text in enumerate(texts):
        prompt, generation = divmod(row, rollouts.num_generations)
        example = rollouts.prompts.examples[prompt]
        found.append(
            {
                "round": number,
                "index": recorded.indices[recorded.scored_prompts[prompt]],
                "generation": generation,
                "prompt": example.prompt,
                "completion": text,
                "answer": example.answer,
                "reward": _number(rewards.total[row]),
                "rewards": {name: _number(part[row]) for name, part in rewards.parts.items()},
                "finished": bool(rollouts.finished[row]),
            }
        )
    return found


def _number(value: Tensor) -> float | None:
    """As JSON has it: null for a reward that did not apply or is not finite."""
    number = float(value)
    return number if math.isfinite(number) else None
