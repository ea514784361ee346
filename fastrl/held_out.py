"""The evaluation that a run's config asks for, of a trainer as it is now."""

from __future__ import annotations

import dataclasses

from fastrl.evaluate import Evaluation, evaluate_policy
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
    return evaluate_policy(
        trainer.sampler.engine,
        trainer.policy.tokenizer,
        prompts,
        trainer.sampler.scorer,
        sampling,
        make_generator(trainer.policy.device, trainer.config.seed, "eval"),
        pass_threshold=settings.pass_threshold,
    )
