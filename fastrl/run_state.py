"""A run as it stands: what is saved of it, when, and what is said at an untimely end."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastrl.checkpoint import (
    Stateful,
    TrainerState,
    load_carried,
    newest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from fastrl.config import Config
from fastrl.errors import InputError, NotFiniteError
from fastrl.inspection import save_batch
from fastrl.memory.expected import Expected, resized
from fastrl.memory.limit import MemoryLimit
from fastrl.memory.recovery import OutOfMemory, is_out_of_memory, reason_of
from fastrl.rollout.native import NativeEngine
from fastrl.stop_requests import Interrupted
from fastrl.trainer import Trainer


class RunState:
    """Holds where a run is, and writes it down."""

    def __init__(
        self, config: Config, directory: Path, trainer: Trainer, state: TrainerState,
        checkpoint: Path | None, expected: Expected, limit: MemoryLimit,
    ) -> None:  # fmt: skip
        self.config = config
        self.directory = directory
        self.trainer = trainer
        self.state = state
        self.checkpoint = checkpoint
        self.carried = None if checkpoint is None else load_carried(checkpoint)
        self.expected = expected
        self.limit = limit

    def look_at_limit(self) -> list[str]:
        """What there is to know of memory_limit; InputError where it cannot be kept."""
        given, size = self.config.memory_limit, self.limit.limit
        if given is None or size is None:
            return []
        if self.expected.plan is not None:
            self.limit.outside = self.expected.plan.outside
        trainer, engine = self.trainer, self.trainer.sampler.engine
        gib = engine.smallest_kv_cache_gib if isinstance(engine, NativeEngine) else None
        smallest = resized(self.config, trainer.recovery.smallest, gib)
        return self.expected.check(size, given, smallest)

    def plan(self) -> None:
        """Let the metrics say what the plan expects, with sizes as they are now."""
        self.expected.follow(self.trainer.recovery)
        self.trainer.memory.planned = self.expected.peaks
        self.trainer.memory.planned_highest = self.expected.highest

    def advance(self, seconds: float, **changes: Any) -> None:
        """So many seconds of training later, with other values of fields of the state."""
        total = self.state.train_seconds + seconds
        changes["memory"] = self.trainer.recovery.state_dict()
        self.state = dataclasses.replace(self.state, train_seconds=total, **changes)

    def save(self, learner: Stateful) -> Path:
        """Write a checkpoint of the state."""
        trainer = self.trainer
        path = save_checkpoint(
            self.directory, trainer.policy, learner, self.state, self.carried,
            reference=trainer.reference if trainer.method.reference_update is not None else None,
        )  # fmt: skip
        # The weights that training starts from are not worth keeping as the best: they come again.
        best, keep = self.state.best_step or None, self.config.save.save_total_limit
        remove_old_checkpoints(self.directory, keep=keep, best=best)
        return path

    def interrupt(self, learner: Stateful) -> None:
        """Stop here, as the user has asked."""
        path = self.save(learner)
        raise Interrupted(
            f"stopped; continue with: fastrl train --resume {self.directory} (saved {path.name})"
        )

    @contextmanager
    def kept(self, learner: Stateful) -> Iterator[None]:
        """The block within the limit; if it fails that the user can mend, and has changed nothing
        by then, save.

        A step changes nothing before it has all rewards. Weights that have diverged are not worth
        saving, but what they met is; those that memory has stopped half-way are of no step.
        """
        num_begun = learner.num_begun
        try:
            with self.limit.kept():
                yield
        except NotFiniteError as error:
            if self.trainer.last_sampled is not None:
                where = save_batch(self.directory, self.trainer)
                raise NotFiniteError(f"{error}; the last batch is in {where}") from error
            raise
        except Exception as error:
            if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
                if isinstance(error, InputError):
                    self.save(learner)
                raise
            is_known = isinstance(error, OutOfMemory)
            reason = str(error) if is_known else f"memory ran out ({reason_of(error)})"
            traceback.clear_frames(error.__traceback__)  # they hold what there was no room for
            rest = self._what_is_left(learner, has_moved=learner.num_begun != num_begun)
            advice = self.expected.advice(self.trainer.recovery, self.limit.limit)
            raise OutOfMemory("\n".join([f"{reason}; {rest}", *advice])) from None

    def _what_is_left(self, learner: Stateful, *, has_moved: bool) -> str:
        """What is left of the run after memory has run out."""
        resume = f"fastrl train --resume {self.directory}"
        if not has_moved:
            return f"{self.save(learner).name} has what was before; go on with {resume}"
        found = newest_checkpoint(self.directory).checkpoint
        last = "there is no checkpoint" if found is None else f"go on from {found.name} ({resume})"
        return f"a part of the weights has moved by then, which cannot be undone; {last}"


def bytes_of_weights(trainer: Trainer) -> int:
    """Of the policy and of the value model."""
    modules = [trainer.policy.model]
    if trainer.critic is not None:
        modules.append(trainer.critic.trained)
    return sum(x.nbytes for x in {x for module in modules for x in module.parameters()})
