"""What a run may write where: nothing of the user's is ever overwritten unasked."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from fastrl.checkpoint import newest_checkpoint, remove_old_checkpoints
from fastrl.config import Config, SaveConfig
from fastrl.config_io import RUN_MARK
from fastrl.errors import InputError
from fastrl.policy import Policy

RUN_FILES = ("config.toml", "metrics.jsonl", "completions.jsonl", "curve.png", "summary.json")
RUN_FOLDERS = ("tensorboard", "reference", "final")


def starting_point(directory: Path, *, overwrite: bool, resume: bool) -> Path | None:
    """The checkpoint to continue from; refuses to write over anything that was not asked for."""
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
    return None


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


def check_resumable(saved: Config, wanted: Config) -> None:
    """Only what leaves past steps and the comparison with the start as they were may change."""
    allowed = dataclasses.replace(
        saved,
        output_dir=wanted.output_dir,
        max_steps=wanted.max_steps,
        max_tokens_per_pass=wanted.max_tokens_per_pass,
        save=wanted.save,
        model=dataclasses.replace(saved.model, device=wanted.model.device),
        eval=dataclasses.replace(saved.eval, eval_steps=wanted.eval.eval_steps),
    )
    if wanted != allowed:
        raise InputError(
            "a resumed run may change max_steps, max_tokens_per_pass, model.device, "
            "eval.eval_steps and save.* only; start a new run for anything else"
        )


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


def check_disk(directory: Path, policy: Policy, save: SaveConfig) -> None:
    """A writable place with room for the checkpoints, the reference and the final weights."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"cannot write to {directory}: {existing} is not a writable directory")
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    checkpoints = save.save_total_limit + 1 if save.save_steps else 1  # one more while writing
    needed = (3 * checkpoints + 2) * weights + 2**24  # a checkpoint holds weights and two moments
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"not enough disk space for {directory}: {needed / 2**20:.0f} MiB needed, "
            f"{free / 2**20:.0f} MiB free; choose another --output-dir"
        )
