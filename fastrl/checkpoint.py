"""Checkpoints that are either whole or absent, in Hugging Face format.

A run directory holds `checkpoint-N` after N steps, or `warm-start-K` while the supervised warm
start was interrupted after K steps. Random streams are functions of the seed and the step, so they
need no saving.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrl.errors import InputError
from fastrl.whole_directory import problem_of, remove_partial, renamed_when_whole

REFERENCE = "reference"
"""Folder of the policy that a penalty pulls towards: in the run, or in a checkpoint if it moves."""
_NAME = re.compile(r"(warm-start|checkpoint)-(\d+)")


@dataclass(frozen=True)
class TrainerState:
    """Everything but weights and optimizer moments that the next step depends on."""

    step: int = 0
    warm_start_step: int = 0
    num_tokens: int = 0  # prompt and completion tokens seen in rollouts so far
    train_seconds: float = 0.0
    pass_at_1_before: float | None = None
    controllers: dict[str, dict[str, float]] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)  # of the stream; empty before any step
    best_step: int | None = None  # that with the best held-out pass@1 so far, the first of equals
    best_pass_at_1: float | None = None
    num_worse: int = 0  # evaluations since then
    memory: dict[str, Any] = field(default_factory=dict)  # sizes that memory has made smaller

    def judged(self, step: int, pass_at_1: float) -> TrainerState:
        """The state after a held-out evaluation of the weights of `step`."""
        if self.best_pass_at_1 is None or pass_at_1 > self.best_pass_at_1:
            return dataclasses.replace(self, best_step=step, best_pass_at_1=pass_at_1, num_worse=0)
        return dataclasses.replace(self, num_worse=self.num_worse + 1)

    @property
    def directory_name(self) -> str:
        """Where this state is saved, below the run directory."""
        if self.pass_at_1_before is None:
            return f"warm-start-{self.warm_start_step}"
        return f"checkpoint-{self.step}"


class Stateful(Protocol):
    """What learns: optimizers, and a value model if there is one."""

    @property
    def num_begun(self) -> int:
        """Optimizer steps in which a weight has moved."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Savable(Protocol):
    """A policy or its reference."""

    def save(self, directory: Path) -> None: ...


def save_checkpoint(
    run_directory: Path, policy: Savable, learner: Stateful, state: TrainerState,
    carried: Mapping[str, Tensor] | None = None, *, reference: Savable | None = None,
) -> Path:  # fmt: skip
    """Write model, tokenizer, what learns and state; the directory appears when it is whole.

    carried: of partial rollouts, see `fastrl.carried.InFlight.state`. reference: where it moves.
    """
    target = run_directory / state.directory_name
    if target.exists() and problem_of(target) is None:
        return target  # a state is a function of the run and the step: what is there is the same
    with renamed_when_whole(target) as partial:
        policy.save(partial)
        torch.save(learner.state_dict(), partial / "optimizer.pt")
        if reference is not None:
            reference.save(partial / REFERENCE)
        if carried is not None:
            save_file(dict(carried), partial / "carried.safetensors")
        text = json.dumps(dataclasses.asdict(state), indent=2)
        (partial / "trainer_state.json").write_text(text, encoding="utf-8")
    return target


def save_policy(directory: Path, policy: Savable) -> None:
    """Write model and tokenizer to `directory`, whole or not at all, replacing what is there."""
    with renamed_when_whole(directory) as partial:
        policy.save(partial)


class Newest(NamedTuple):
    """Where a run can go on from."""

    checkpoint: Path | None  # None where the run has none yet
    notes: list[str]  # of what had to be passed over


def newest_checkpoint(run_directory: Path) -> Newest:
    """The newest checkpoint that is whole; InputError where there are some but none is."""
    notes: list[str] = []
    found = _all_checkpoints(run_directory)
    for path in reversed(found):
        problem = problem_of(path)
        if problem is None:
            return Newest(path, notes)
        notes.append(f"{path.name} is damaged and was passed over: {problem}")
    if found:
        raise InputError(
            f"no checkpoint in {run_directory} is whole ({'; '.join(notes)}); start the run again "
            "with --overwrite"
        )
    return Newest(None, [])


def remove_old_checkpoints(run_directory: Path, *, keep: int, best: int | None = None) -> None:
    """Delete all but the `keep` newest and that of step `best`, and whatever never became whole."""
    checkpoints = _all_checkpoints(run_directory)
    for path in checkpoints[: max(0, len(checkpoints) - keep)]:
        if best is None or path.name != f"checkpoint-{best}":
            shutil.rmtree(path)
    remove_partial(run_directory)


def load_state(checkpoint: Path) -> TrainerState:
    """The saved trainer state."""
    path = checkpoint / "trainer_state.json"
    try:
        return TrainerState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{checkpoint} is not a FastRL checkpoint: {error}") from error


def load_carried(checkpoint: Path) -> dict[str, Tensor] | None:
    """What `save_checkpoint` was given as `carried`."""
    path = checkpoint / "carried.safetensors"
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot restore the partial rollouts from {path}: {error}") from error


def load_learner(checkpoint: Path, learner: Stateful) -> None:
    """Give optimizers over the same parameters, and a value model, what they were saved with."""
    path = checkpoint / "optimizer.pt"
    try:
        learner.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError) as error:
        raise InputError(f"cannot restore the optimizer from {path}: {error}") from error


def _all_checkpoints(run_directory: Path) -> list[Path]:
    """Oldest first; every checkpoint of the warm start is older than every one after it."""
    matches = [
        (match[1] == "checkpoint", int(match[2]), path)
        for path in run_directory.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, _, path in sorted(matches)]
