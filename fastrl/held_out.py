"""The evaluation that a run's config asks for, of a trainer as it is now."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

from fastrl.assembly import build_trainer
from fastrl.checkpoint import newest_checkpoint
from fastrl.config import Config
from fastrl.conversations import answers_of
from fastrl.errors import InputError
from fastrl.evaluate import Evaluation, evaluate_policy
from fastrl.memory.limit import limit_of
from fastrl.seeding import make_generator
from fastrl.trainer import Trainer
from fastrl.types import Prompts


def evaluate_held_out(trainer: Trainer, prompts: Prompts) -> Evaluation:
    """The config's evaluation, with the same draws at every call."""
    settings = trainer.config.eval
    sampling = dataclasses.replace(
        trainer.sampler.sampling,
        num_generations=settings.num_samples,
        temperature=settings.temperature,
    )
    engine, tokenizer = trainer.sampler.engine, trainer.policy.tokenizer
    generator = make_generator(trainer.policy.device, trainer.config.seed, "eval")
    return evaluate_policy(
        engine,
        tokenizer,
        prompts,
        trainer.sampler.scorer,
        sampling,
        generator,
        answer=answers_of(engine, tokenizer, trainer.encode, sampling, generator),
        pass_threshold=settings.pass_threshold,
    )


def evaluate(config: Config, run_directory: Path | None) -> Evaluation:
    """Held-out evaluation of a finished or running run, or of the model a config names.

    Within the config's memory_limit; what finds no room there is sampled again with fewer rows.
    """
    limit = limit_of(config)
    directory = None
    if run_directory is not None:
        final = run_directory / "final"
        directory = final if final.is_dir() else newest_checkpoint(run_directory).checkpoint
        if directory is None:
            raise InputError(f"{run_directory} has neither final nor a checkpoint to evaluate")
    trainer = build_trainer(config, directory)
    with closing(trainer.sampler.scorer), limit.kept():
        return evaluate_held_out(trainer, trainer.encode(trainer.task.eval_examples()))
