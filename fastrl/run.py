"""A whole training run: checks first, then warm start, training, evaluation and results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fastrl.assembly import build_trainer
from fastrl.checkpoint import REFERENCE, Stateful, TrainerState, load_learner, save_policy
from fastrl.config import Config
from fastrl.config_io import load_config, save_config
from fastrl.determinism import deterministic
from fastrl.errors import InputError
from fastrl.evaluate import Evaluation
from fastrl.held_out import evaluate_held_out
from fastrl.memory.expected import Expected, built
from fastrl.memory.limit import MemoryLimit, limit_of, resident_bytes
from fastrl.methods.needs import needs_reference
from fastrl.progress import make_progress
from fastrl.reference import make_reference
from fastrl.replay import Recorder, Replay
from fastrl.report import RunLog, draw_curve, results_of, write_summary
from fastrl.restore import restore
from fastrl.rollout import check_interval
from fastrl.run_directory import (
    check_disk,
    check_resumable,
    clear,
    discard_results,
    only_writer,
    refuse_own_input,
    starting_point,
)
from fastrl.run_state import RunState, bytes_of_weights
from fastrl.stop_requests import stop_requests
from fastrl.trainer import Trainer
from fastrl.values.summary import ValueProgress
from fastrl.warm_start import WarmStart


def train(
    config: Config, *, overwrite: bool = False, resume: bool = False,
    allow_change: Sequence[str] = (),
    save_rollouts: Path | None = None, replay_rollouts: Path | None = None,
) -> Mapping[str, Any]:  # fmt: skip
    """Train as `config` says and return the summary; all that can be checked is checked first.

    allow_change: fields, or tables of them, that may differ from those of the run to resume.
    save_rollouts: a directory for what every step samples; replay_rollouts: train on what is in
    one instead of sampling. Raises InputError for what the user can mend and Interrupted after a
    clean stop on Ctrl-C.
    """
    if save_rollouts is not None and replay_rollouts is not None:
        raise InputError("--save-rollouts and --replay-rollouts exclude each other; give one")
    run_directory = Path(config.output_dir)
    checkpoint, notes = starting_point(run_directory, overwrite=overwrite, resume=resume)
    if resume:
        check_resumable(load_config(run_directory / "config.toml"), config, allow_change)
    if overwrite:
        refuse_own_input(run_directory, config)
    limit = limit_of(config)
    trainer = built(lambda: build_trainer(config, checkpoint), config)
    with closing(trainer.sampler.scorer):
        state = TrainerState()
        if checkpoint is not None:
            state = restore(trainer, run_directory, checkpoint)
        before = resident_bytes() - bytes_of_weights(trainer)
        expected = Expected(config, trainer.policy.device, before=before)
        run = Run(config, run_directory, trainer, state, checkpoint, expected, limit)
        run.notes += [*notes, *run.look_at_limit()]
        check_disk(run_directory, trainer, config.save)
        tokenizer = trainer.policy.tokenizer
        if replay_rollouts is not None:
            replay = Replay(replay_rollouts)
            replay.check(config, tokenizer, first_step=run.state.step)
            trainer.sampler.replay = replay
        run.check_engine(run.state.step)
        if save_rollouts is not None:
            trainer.sampler.recorder = Recorder(
                save_rollouts, config, tokenizer, overwrite=overwrite, resume=resume
            )
        run_directory.mkdir(parents=True, exist_ok=True)
        with only_writer(run_directory):
            if overwrite:
                clear(run_directory)
            save_config(config, run_directory / "config.toml")
            trainer.policy.save_base(run_directory)
            return run.execute()


class Run(RunState):
    """One run in progress: the trainer, its state and its logs."""

    def __init__(
        self, config: Config, directory: Path, trainer: Trainer, state: TrainerState,
        checkpoint: Path | None, expected: Expected, limit: MemoryLimit,
    ) -> None:  # fmt: skip
        super().__init__(config, directory, trainer, state, checkpoint, expected, limit)
        self.plan()
        self.notes: list[str] = list(expected.notes)
        self.noted = False
        self.eval_prompts = trainer.encode(trainer.task.eval_examples())

    def check_engine(self, step: int) -> list[str]:
        """The engine must sample from the policy; returns what there is to know and is not yet."""
        found = self.trainer.sampler.check(self.trainer.method, step)
        new = [note for note in found if note not in self.notes]
        self.notes += new
        return new

    def execute(self) -> Mapping[str, Any]:
        """Warm start, train, evaluate and write the results."""
        if self.state.step < self.config.max_steps:
            discard_results(self.directory)
        # A run that stopped before its first checkpoint starts anew, and so do its logs.
        logged = self.state.step if self.checkpoint is not None else -1
        with (
            deterministic(),
            stop_requests() as stop,
            RunLog(self.directory, self.config, step=logged) as log,
            make_progress(self.config) as progress,
        ):
            self.log, self.progress, self.stop = log, progress, stop
            self._say(self.notes)
            if self.state.pass_at_1_before is None:
                self._warm_start()
            with self.kept(self.trainer.learner):
                self._reference()
            self._values()
            evaluation = self._train()
        save_policy(self.directory / "final", self.trainer.policy)
        draw_curve(self.directory)
        return write_summary(
            self.directory, self.config, results_of(self.state, self.trainer, evaluation)
        )

    def _warm_start(self) -> None:
        """Supervised steps, then the evaluation that training is measured against."""
        phase = WarmStart(self.config, self.trainer)
        if self.checkpoint is not None:
            load_learner(self.checkpoint, phase.stepper)
        for step in range(self.state.warm_start_step, self.config.warm_start.steps):
            started = time.perf_counter()
            with self.kept(phase.stepper):
                loss = phase.train_step(step)
            self.advance(time.perf_counter() - started, warm_start_step=step + 1)
            self._adapt(f"warm start step {step + 1}")
            self.progress.warm_start(step + 1, loss)
            if self.stop.requested:
                self.interrupt(phase.stepper)
        before = self._evaluate(phase.stepper)
        self.state = dataclasses.replace(self.state, pass_at_1_before=before.pass_at[1])
        if self.config.warm_start.steps:  # an engine may have kept a copy of earlier weights
            with self.kept(phase.stepper):
                self._say(self.check_engine(0))
        self.checkpoint = None
        if self.config.save.save_steps:
            self.save(self.trainer.learner)

    def _reference(self) -> None:
        """Freeze the policy that training starts from, where the method stays close to it."""
        trainer = self.trainer
        if not needs_reference(trainer.method) or trainer.reference is not None:
            return
        kind, moves = self.config.model.reference, trainer.method.reference_update is not None
        trainer.reference = make_reference(trainer.policy, kind, moves=moves)
        save_policy(self.directory / REFERENCE, trainer.reference)

    def _values(self) -> None:
        """What the method has to know of every prompt before it trains, where it has to."""
        values = self.trainer.sampler.values
        if values is None or values.is_ready:
            return

        def watch(progress: ValueProgress) -> None:
            self.progress.note(progress.line)
            self._adapt("values of prompts")
            if self.stop.requested:
                self.interrupt(self.trainer.learner)

        with self.kept(self.trainer.learner):
            summary = values.prepare(watch)
        self._say([] if summary is None else summary.lines)

    def _train(self) -> Evaluation:
        config, trainer, save = self.config, self.trainer, self.config.save
        if self.checkpoint is not None:
            load_learner(self.checkpoint, trainer.learner)
        evaluation = None
        while self.state.step < config.max_steps and not self._is_stuck:
            self._step(self.state.step)
            step, evaluation = self.state.step, None
            if config.eval.eval_steps and step % config.eval.eval_steps == 0:
                evaluation = self._evaluate(trainer.learner)
            is_best = self.state.best_step == step
            is_due = bool(save.save_steps) and (is_best or step % save.save_steps == 0)
            if is_due and step < config.max_steps:  # the last step is saved below
                self.save(trainer.learner)
            if self.stop.requested and step < config.max_steps:
                self.interrupt(trainer.learner)
        self.save(trainer.learner)
        if self._is_stuck:
            self._say([f"no better pass@1 in {self.state.num_worse} evaluations: stopped early"])
        return evaluation or self._evaluate(trainer.learner)

    @property
    def _is_stuck(self) -> bool:
        """Whether the held-out pass@1 has not risen for as long as the run is to wait."""
        patience = self.config.eval.patience
        return bool(patience) and self.state.num_worse >= patience

    def _step(self, step: int) -> None:
        """Training step `step`, from 0, with all that is logged of it."""
        trainer, every = self.trainer, check_interval(self.config.rollout.engine_args)
        started = time.perf_counter()
        with self.kept(trainer.learner):
            if every and step and step % every == 0:
                self._say(self.check_engine(step))
            output = trainer.train_step(step)
        carried = trainer.sampler.carried
        self.carried = None if carried is None else carried.state()
        self.advance(
            time.perf_counter() - started,
            step=step + 1,
            num_tokens=self.state.num_tokens + output.num_tokens,
            controllers=trainer.adaptation.state_dict(),
            prompts=trainer.sampler.stream.state_dict(),
        )
        self._note(step + 1, output.sampled.shortage)
        self._say([] if output.problem is None else [f"step {step + 1}: {output.problem}"])
        self._adapt(f"step {step + 1}")
        output.metrics["num_tokens"] = float(self.state.num_tokens)
        self.log.step(step + 1, output)
        self.progress.step(step + 1, output.metrics)

    def _evaluate(self, learner: Stateful) -> Evaluation:
        """Held-out evaluation of the weights as they are now."""
        self.trainer.recovery.begin()
        with self.kept(learner):
            evaluation = evaluate_held_out(self.trainer, self.eval_prompts)
        self.state = self.state.judged(self.state.step, evaluation.pass_at[1])
        self.advance(0.0)
        self._adapt("evaluation")
        self.log.evaluation(self.state.step, evaluation)
        self.progress.evaluation(self.state.step, evaluation.metrics)
        return evaluation

    def _adapt(self, what: str) -> None:
        """Tell of sizes that memory has made smaller, and plan with them."""
        notes = self.trainer.recovery.take_notes()
        self._say([f"{what}: {note}" for note in notes])
        if notes:
            self.plan()

    def _say(self, notes: Sequence[str]) -> None:
        for note in notes:
            self.progress.note(note)

    def _note(self, step: int, message: str | None) -> None:
        """Say once what may befall many steps; the metrics count it."""
        if message is not None and not self.noted:
            self.noted = True
            self.progress.note(f"step {step}: {message}")
