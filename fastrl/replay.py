"""Rollouts written to disk step by step, and trained on again without sampling.

A recording is a directory: `recording.json` says what it was made with, `step-N` holds what step N
(counted from 1, as in the logs) sampled: `rollouts.safetensors`, and `completions.jsonl` to read.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrl.config import Config
from fastrl.conversations import as_recorded
from fastrl.errors import InputError
from fastrl.rollout_tensors import from_tensors, prompts_of, to_tensors
from fastrl.sampler import Scored
from fastrl.tasks.prompt import prompt_start
from fastrl.types import Example, Prompts, Rewards, Rollouts
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


class SavedRound(NamedTuple):
    """One round as it was read back."""

    tensors: dict[str, Tensor]
    lines: list[dict[str, Any]]  # of the scored completions, in their order
    rewards: Rewards

    @property
    def scored_prompts(self) -> list[int]:
        """See `Recorded`."""
        found: list[int] = self.tensors["scored_prompts"].tolist()
        return found


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
            tensors |= {f"{number}.{name}": value for name, value in found.items()}
            lines += [json.dumps(line, ensure_ascii=False) for line in _lines(number, recorded)]
        with renamed_when_whole(self.directory / f"step-{step + 1}") as partial:
            save_file(tensors, partial / "rollouts.safetensors")
            text = "".join(f"{line}\n" for line in lines)
            (partial / "completions.jsonl").write_text(text, encoding="utf-8")


class Replay:
    """Stands in for engine and rewards with what a `Recorder` wrote."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self._step: int | None = None
        self._rounds: list[SavedRound] = []

    def check(self, config: Config, tokenizer: Vocabulary, *, first_step: int) -> None:
        """Raise InputError unless the recording suits a run from first_step (from 0) to its end."""
        wanted = manifest_of(config, tokenizer)
        for name, value in wanted.items():
            if self.manifest.get(name) == value:
                continue
            if name == "tokenizer":
                raise InputError(
                    f"the rollouts in {self.directory} were recorded with another tokenizer or "
                    "vocabulary than that of this model; replay them with the same model"
                )
            raise InputError(
                f"the rollouts in {self.directory} were recorded with {name} = "
                f"{self.manifest.get(name)!r}, but this run has {value!r}; set it to the same"
            )
        missing = [n for n in range(first_step + 1, config.max_steps + 1) if not self._has(n)]
        if missing:
            raise InputError(
                f"{self.directory} has no rollouts of step {missing[0]}, and max_steps is "
                f"{config.max_steps}; lower it or record more"
            )

    def rollouts(self, step: int, number: int, prompts: Prompts) -> Rollouts:
        """What round `number` of step `step`, both from 0, sampled for these prompts."""
        rounds = self._load(step)
        if number >= len(rounds):
            raise InputError(
                f"step {step + 1} was recorded in {len(rounds)} rounds of sampling, but this run "
                "asks for another one; keep to the method and rewards of the recording, or set "
                f"objective.max_sampling_rounds = {len(rounds)}"
            )
        saved = prompts_of(rounds[number].tensors)
        if len(saved) != len(prompts):
            raise InputError(
                f"step {step + 1} was recorded with {len(saved)} prompts in round {number + 1}, "
                f"but this run asks for {len(prompts)}; keep to the method of the recording"
            )
        for ids, wanted, example in zip(saved, prompts.token_ids, prompts.examples, strict=True):
            if not torch.equal(ids, wanted):
                raise InputError(
                    f"step {step + 1} was recorded with other prompts than "
                    f"{prompt_start(example.prompt)}; replay with the same task, seed, warm_start "
                    "and chat template"
                )
        return from_tensors(rounds[number].tensors, prompts.examples)

    def asked(self, step: int, number: int, examples: Sequence[Example]) -> list[Example]:
        """Conversations at the turns that were recorded, with the answers before them.

        Those that do not fit stay as they are: `rollouts` says so.
        """
        rounds = self._load(step)
        lines = rounds[number].lines if number < len(rounds) else []
        recorded = [line["prompt"] for line in lines[:: self.manifest["rollout.num_generations"]]]
        if len(recorded) != len(examples):
            return list(examples)
        return [as_recorded(*pair) for pair in zip(examples, recorded, strict=True)]

    def rewards(self, step: int, number: int, texts: Sequence[str]) -> Rewards:
        """The recorded rewards of the completions with these texts."""
        saved = self._load(step)[number]
        if [line["completion"] for line in saved.lines] != list(texts):
            raise InputError(
                f"the completions of step {step + 1} have other texts than were recorded; replay "
                "with the same tokenizer and library versions"
            )
        return saved.rewards

    def steps(self) -> list[int]:
        """The steps that are there, counted from 0."""
        names = [path.name.removeprefix("step-") for path in self.directory.glob("step-*")]
        return sorted(int(name) - 1 for name in names if name.isdigit())

    def rounds(self, step: int) -> list[SavedRound]:
        """What was recorded of a step, counted from 0."""
        return self._load(step)

    def _has(self, number: int) -> bool:
        return (self.directory / f"step-{number}" / "rollouts.safetensors").is_file()

    def _load(self, step: int) -> list[SavedRound]:
        if step != self._step:
            path = self.directory / f"step-{step + 1}"
            self._rounds = _read_rounds(path, self.manifest["rewards"])
            self._step = step
        return self._rounds


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
        parts = {name: float(part[row]) for name, part in rewards.parts.items()}
        found.append(
            {
                "round": number,
                "index": recorded.indices[recorded.scored_prompts[prompt]],
                "generation": generation,
                "prompt": example.prompt,
                "completion": text,
                "answer": example.answer,
                "reward": float(rewards.total[row]),
                # JSON has no NaN: a reward that did not apply is null.
                "rewards": {k: value if value == value else None for k, value in parts.items()},
                "finished": bool(rollouts.finished[row]),
            }
        )
    return found


def _read_rounds(path: Path, rewards: Sequence[str]) -> list[SavedRound]:
    """rewards: their names in the order of the run."""
    try:
        tensors = load_file(path / "rollouts.safetensors")
        text = (path / "completions.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.split("\n") if line]
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot read the rollouts in {path}: {error}") from error
    rounds = []
    for number in range(1 + max(int(name.partition(".")[0]) for name in tensors)):
        start = f"{number}."
        own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        parts = {k: own[f"rewards/{k}"] for k in rewards if f"rewards/{k}" in own}
        mine = [line for line in lines if line["round"] == number]
        rounds.append(SavedRound(own, mine, Rewards(own["reward"], parts)))
    return rounds
