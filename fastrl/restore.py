"""A trainer as it was when a checkpoint was written."""

from __future__ import annotations

from pathlib import Path

from fastrl.carried import in_flight_from
from fastrl.checkpoint import REFERENCE, TrainerState, load_carried, load_state
from fastrl.errors import InputError
from fastrl.methods.needs import requirements
from fastrl.reference import load_reference
from fastrl.trainer import Trainer


def restore(trainer: Trainer, directory: Path, checkpoint: Path) -> TrainerState:
    """Give a trainer with the checkpoint's weights all else but the optimizer's moments.

    directory: of the run, which has the reference policy.
    """
    config, sampler = trainer.config, trainer.sampler
    state = load_state(checkpoint)
    if state.step > config.max_steps:
        raise InputError(f"max_steps is {config.max_steps} but {checkpoint.name} is past it")
    trainer.method = trainer.adaptation.load_state_dict(state.controllers, trainer.method)
    trainer.recovery.load_state_dict(state.memory)
    sampler.use_room()
    if state.prompts:
        sampler.stream.load_state_dict(state.prompts)
    else:  # a checkpoint of before the first step, or of before there were streams
        sampler.stream.cursor += state.step * config.prompts_per_step
    carried = load_carried(checkpoint)
    if carried is not None:
        sampler.carried = in_flight_from(carried, trainer.task)
    if "ref_logps" in requirements(trainer.method) and state.step > 0:
        if not (directory / "reference").is_dir():
            raise InputError(
                f"{directory} has no reference policy: the run began without one; keep to a method "
                "that needs none"
            )
        moved = checkpoint / REFERENCE  # where it follows the policy
        path = moved if moved.is_dir() else directory / REFERENCE
        trainer.reference = load_reference(trainer.policy, config.model.reference, path)
    return state
