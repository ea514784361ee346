"""Stage one of A*-PO alone: values of prompts for runs to come."""

from __future__ import annotations

from contextlib import closing

from fastrl.assembly import build_trainer
from fastrl.config import Config
from fastrl.determinism import deterministic
from fastrl.errors import InputError
from fastrl.memory.limit import limit_of
from fastrl.values.summary import OnBatch, ValueSummary
from fastrl.warm_start import WarmStart


def run_vstar(config: Config, *, on_batch: OnBatch | None = None) -> ValueSummary:
    """Sample and score the reference completions that `fastrl train` with this config needs.

    The reference is the policy that training starts from: after the warm start, if there is one,
    which is a function of the config. on_batch: called after each batch is on disk.
    """
    limit = limit_of(config)
    trainer = build_trainer(config)
    with closing(trainer.sampler.scorer), deterministic(), limit.kept():
        values = trainer.sampler.values
        if values is None:
            raise InputError(
                f"method {config.method!r} needs no values of prompts; set method = 'astar_po'"
            )
        phase = WarmStart(config, trainer)
        for step in range(config.warm_start.steps):
            phase.train_step(step)
        del phase
        found = values.prepare(on_batch)
    if found is None:
        raise InputError(
            f"method {config.method!r} finds its values while it trains; there is nothing to do "
            "before"
        )
    return found
