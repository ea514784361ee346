"""What a run may write where: nothing of the user's is ever overwritten unasked."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastrl.checkpoint import Newest, newest_checkpoint, remove_old_checkpoints
from fastrl.config import Config, SaveConfig
from fastrl.config_io import RUN_MARK, as_paths
from fastrl.errors import InputError, nearest
from fastrl.trainer import Trainer

RUN_FILES = ("config.toml", "metrics.jsonl", "completions.jsonl", "curve.png", "summary.json")
LOCK = ".lock"
RUN_FOLDERS = ("tensorboard", "reference", "base", "not_finite", "final")


def starting_point(directory: Path, *, overwrite: bool, resume: bool) -> Newest:
    """What to continue from; refuses to write over anything that was not asked for."""
    holds_run = is_run(directory)
    if resume:
        if not holds_run:
            raise InputError(f"no run to resume in {directory}: it has no config of a run")
        return newest_checkpoint(directory)
    if holds_run and not overwrite:
        raise InputError(
            f"{directory} already holds a run; continue it with --resume {directory}, replace it "
            "with --overwrite or choose another --output-dir"
        )
    if (
        directory.exists()
        and not holds_run
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise InputError(f"{directory} exists and is not a FastRL run; choose another --output-dir")
    return Newest(None, [])


def is_run(directory: Path) -> bool:
    """Whether a run was written here: its config carries the mark of one."""
    path = directory / "config.toml"
    return path.is_file() and path.read_bytes().startswith(RUN_MARK.encode())


def refuse_own_input(directory: Path, config: Config) -> None:
    """A run that is replaced must not be read from: its files are deleted first."""
    inputs = [config.model.path, config.data.eval_path, config.task.removeprefix("jsonl:")]
    for name in inputs:
        if name and Path(name).exists() and directory.resolve() in Path(name).resolve().parents:
            raise InputError(f"--overwrite would delete {name}, which this run reads; move it")


FREE = (
    "output_dir", "max_steps", "max_tokens_per_pass", "workspace_mb", "memory_limit",
    "reward_workers", "reward_timeout", "model.device", "eval.eval_steps", "eval.patience", "save.",
)  # fmt: skip
"""What leaves past steps and the comparison with the start as they were."""


def check_resumable(saved: Config, wanted: Config, allowed: Sequence[str] = ()) -> None:
    """Raise InputError where a resumed run would change what is not free and not in `allowed`.

    allowed: names of fields, or of tables for all of theirs.
    """
    before, now = as_paths(saved), as_paths(wanted)
    for name in allowed:
        if not any(_belongs(path, name) for path in (*before, *now, *as_paths(Config()))):
            raise InputError(f"--allow-change {name}: {nearest(name, sorted(now))}")
    changed = [
        path
        for path in sorted({*before, *now})
        if before.get(path) != now.get(path)
        and not any(_belongs(path, name) for name in (*FREE, *allowed))
    ]
    if changed:
        shown = ", ".join(f"{x} ({before.get(x)!r} -> {now.get(x)!r})" for x in changed)
        raise InputError(
            f"the resumed run has another {shown}; a run may change {', '.join(FREE)}* as it "
            f"likes; for others add --allow-change {' --allow-change '.join(changed)}, or start a "
            "new run"
        )


def _belongs(path: str, name: str) -> bool:
    """Whether a field is `name`, or in a table of that name."""
    return path == name or path.startswith(f"{name.removesuffix('.')}.")


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Keep a second process from writing the same run; the lock ends with this process."""
    with (directory / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is writing to {directory}; wait for it or choose another "
                "--output-dir"
            ) from error
        yield


def discard_results(directory: Path) -> None:
    """Remove what described the end of the run, which training on makes stale."""
    for name in ("summary.json", "curve.png"):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "final", ignore_errors=True)


def clear(directory: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    if not directory.exists():
        return
    for name in RUN_FILES:
        (directory / name).unlink(missing_ok=True)
    for name in RUN_FOLDERS:
        shutil.rmtree(directory / name, ignore_errors=True)
    remove_old_checkpoints(directory, keep=0)


def check_disk(directory: Path, trainer: Trainer, save: SaveConfig) -> None:
    """A writable place with room for the checkpoints, the reference and the final weights."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"cannot write to {directory}: {existing} is not a writable directory")
    parameters = list(trainer.policy.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    saved = sum(parameter.nbytes for parameter in trained)
    # Two float32 moments are the most that an optimizer keeps; a value model is as large at most.
    checkpoint = saved + sum(8 * parameter.numel() for parameter in trained)
    checkpoint += 0 if trainer.critic is None else 3 * _critic_bytes(trainer)
    num_checkpoints = save.save_total_limit + 2 if save.save_steps else 1  # the best, and one more
    base = sum(x.nbytes for x in parameters) if len(trained) < len(parameters) else 0
    needed = num_checkpoints * checkpoint + 2 * saved + base + 2**24
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"not enough disk space for {directory}: {needed / 2**20:.0f} MiB needed, "
            f"{free / 2**20:.0f} MiB free; choose another --output-dir"
        )


def _critic_bytes(trainer: Trainer) -> int:
    assert trainer.critic is not None
    return sum(parameter.nbytes for parameter in trainer.critic.trained.parameters())
