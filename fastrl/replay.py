"""Rollouts that a run has written to disk, trained on again without sampling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastrl.config import Config
from fastrl.conversations import as_recorded
from fastrl.errors import InputError
from fastrl.recorder import Recorded as Recorded
from fastrl.recorder import Recorder as Recorder
from fastrl.recorder import Vocabulary, manifest_of, read_manifest
from fastrl.rollout_tensors import from_tensors, prompts_of
from fastrl.tasks.prompt import prompt_start
from fastrl.types import Example, Prompts, Rewards, Rollouts


class SavedRound(NamedTuple):
    """One round as it was read back."""

    tensors: dict[str, Tensor]
    lines: list[dict[str, Any]]  # of the scored completions, in their order
    rewards: Rewards

    @property
    def scored_prompts(self) -> list[int]:
        """See `fastrl.recorder.Recorded`."""
        found: list[int] = self.tensors["scored_prompts"].tolist()
        return found


class Replay:
    """Stands in for engine and rewards with what a `fastrl.recorder.Recorder` wrote."""

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

    def greedy_rewards(self, step: int, number: int) -> Tensor:
        """Of the policy's most likely completions of the prompts of a round."""
        found = self._load(step)[number].tensors.get("greedy_rewards")
        if found is None:
            raise InputError(
                f"the rollouts in {self.directory} were recorded without the rewards of greedy "
                "completions, which this run's method compares with, and a replay samples nothing; "
                "record them with this method"
            )
        return found

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
