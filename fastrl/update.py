"""The second half of a step: from packed completions to new weights.

Legend: B completions, S trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastrl.config import Config
from fastrl.critic import Critic
from fastrl.errors import NotFiniteError
from fastrl.learner import Learner
from fastrl.loss import NOT_MEASURED, Measured, PassBackward, measure
from fastrl.memory.recovery import Recovery
from fastrl.methods.axes import hyper_parameters_of
from fastrl.methods.inputs import StepInputs
from fastrl.methods.needs import estimates_from_tokens, looks_past_tokens, needs_view
from fastrl.methods.record import Method, training_parameter
from fastrl.mini_batches import MiniBatch, drawn_order, with_tokens_of
from fastrl.packing import PackedPass
from fastrl.phases import (
    estimates,
    prepare,
    step_loss,
    trained_advantages,
    with_old_logps,
    with_sampler_logps,
)
from fastrl.policy import Policy
from fastrl.savings import work_of
from fastrl.seeding import make_generator
from fastrl.types import StepMetrics
from fastrl.update_records import Done, Packed, Update, gap_of, packed_anew, summed
from fastrl.weight_moves import reposition


class Updater:
    """Makes the optimizer steps of a step, of the policy and of the value model if there is one."""

    def __init__(
        self, config: Config, policy: Policy, critic: Critic | None, recovery: Recovery, *,
        critic_learning_rate: float = 0.0,
    ) -> None:  # fmt: skip
        self.config = config
        self.policy = policy
        self.critic = critic
        self.recovery = recovery
        self.temperature = config.rollout.temperature
        self.learner = Learner(config, policy, critic, critic_learning_rate=critic_learning_rate)

    def update(
        self, packed: Packed, step: int, *, sampler_is_exact: bool,
        repack: Callable[[], Packed] | None = None,
    ) -> Update:  # fmt: skip
        """`num_iterations` times `num_mini_batches` optimizer steps; none where there is no token
        to learn from.

        sampler_is_exact: its log-probabilities are those of the policy before the step. repack: the
        step in passes as small as they have become, for an optimizer step after the first in which
        memory runs out; in the first, the whole update is to be tried again.
        """
        method = packed.method
        trains_policy = step >= critic_warmup_steps(method)
        result = Update(self.set_learning_rates(method, step), packed.inputs)
        parts = [part for part in packed.parts if part.passes]
        if not parts:
            return result
        generator = make_generator(torch.device("cpu"), self.config.seed, "mini_batches", step)
        fast_steps, way_back = look_ahead(method)
        num_iterations = fast_steps + 1 if fast_steps else self.config.num_iterations
        orders = [drawn_order(len(parts), generator) for _ in range(num_iterations)]
        start = self.learner.copy_of_weights() if fast_steps else []
        first = orders[0][0]
        inputs, parts, view = self._before(packed, parts, first, sampler_is_exact=sampler_is_exact)
        gap: StepMetrics = {}
        num_skipped = 0
        num_begun = self.learner.num_begun
        for iteration, order in enumerate(orders):
            if fast_steps and iteration == fast_steps:
                reposition(self.learner.weights, start, way_back=way_back)
            done = []
            for number in order:
                if iteration == 0 and number == first:
                    part = parts[number]
                    found = self._step(method, part, view, trains_policy=trains_policy)
                    gap = gap_of(found, part, view)
                    parts[number] = self._with_old_logps(part, found, view)
                    view = NOT_MEASURED
                else:
                    found = self._later_step(
                        method, parts, number, trains_policy=trains_policy,
                        num_begun=num_begun, repack=repack,
                    )  # fmt: skip
                num_skipped += found.num_skipped
                done.append(found)
            result = summed(result._replace(inputs=inputs, sampler_gap=gap), done)
        return result._replace(num_skipped=num_skipped)

    def set_learning_rates(self, method: Method, step: int) -> float:
        """Use those of a step from here on; returns that of the policy."""
        return self.learner.set_learning_rates(step, critic_warmup_steps(method))

    def _before(
        self, packed: Packed, parts: list[MiniBatch], first: int, *, sampler_is_exact: bool
    ) -> tuple[StepInputs, list[MiniBatch], Measured]:
        """What the policy thinks before the step's first update, as far as anything needs it: the
        step with its advantages, parts with old log-probabilities but for the first to be trained,
        and the view of that one.
        """
        method, inputs = packed.method, packed.inputs
        if not estimates_from_tokens(method):
            parts = [
                part if number == first else self._with_own_logps(part, sampler_is_exact)
                for number, part in enumerate(parts)
            ]
            return inputs, parts, self._view(method, parts[first])
        views = [
            self._measure(part.passes, keeps_graph=len(parts) == 1, critic=self.critic)
            for part in parts
        ]
        passes = [item for part in parts for item in part.passes]
        statistics = [found for view in views for found in view.statistics]
        inputs = estimates(method, inputs, passes, statistics)
        parts = with_tokens_of(parts, inputs)
        for number, view in enumerate(views):
            if number != first:
                logps = [found.logps for found in view.statistics]
                passes = with_old_logps(parts[number].passes, logps)
                parts[number] = parts[number]._replace(passes=passes)
        return inputs, parts, views[first]

    def _view(self, method: Method, part: MiniBatch) -> Measured:
        """What the policy thinks of the part now, if its loss looks at that."""
        has_old_logps = part.passes[0].batch.old_logps is not None
        looks = needs_view(method) if has_old_logps else looks_past_tokens(method)
        return self._measure(part.passes) if looks else NOT_MEASURED

    def _measure(
        self, passes: Sequence[PackedPass], *, keeps_graph: bool = True,
        critic: Critic | None = None,
    ) -> Measured:  # fmt: skip
        keeps_graph = keeps_graph and not self.learner.stepper.runs_backward_twice(len(passes))
        return measure(
            self.policy, passes, self.temperature, critic=critic, keeps_graph=keeps_graph,
            workspace_mb=self.config.workspace_mb,
        )  # fmt: skip

    def _with_own_logps(self, part: MiniBatch, sampler_is_exact: bool) -> MiniBatch:
        """The part with log-probabilities of the policy as it is, at no cost where it can be."""
        recorded = all(item.batch.rollout_logps is not None for item in part.passes)
        if sampler_is_exact and recorded:
            return part._replace(passes=with_sampler_logps(part.passes))
        if part.passes[0].batch.old_logps is not None:
            return part
        statistics = self._measure(part.passes, keeps_graph=False).statistics
        logps = [found.logps for found in statistics]
        return part._replace(passes=with_old_logps(part.passes, logps))

    def _with_old_logps(self, part: MiniBatch, done: Done, view: Measured) -> MiniBatch:
        """The part that was trained first with what its own policy thought of it, dropped tokens
        included: the next iteration may pick them.
        """
        if part.passes[0].batch.old_logps is not None:
            return part
        if view.statistics:
            logps = [found.logps for found in view.statistics]
        elif done.num_skipped:  # the weights are still the same
            return self._with_own_logps(part, sampler_is_exact=False)
        else:
            logps = [out.logps for out in done.losses]
        return part._replace(passes=with_old_logps(part.passes, logps))

    def _later_step(
        self, method: Method, parts: list[MiniBatch], number: int, *, trains_policy: bool,
        num_begun: int, repack: Callable[[], Packed] | None,
    ) -> Done:  # fmt: skip
        """One optimizer step after the first; where memory runs out it alone is begun anew, as the
        weights have moved since the update began, and `parts` get smaller passes.

        num_begun: optimizer steps before the update; if there were none in it, it begins anew.
        """
        generator, now = parts[number].inputs.generator, self.learner.num_begun
        state = None if generator is None else generator.get_state()
        is_stale = False

        def attempt() -> Done:
            nonlocal is_stale
            if is_stale and repack is not None:
                parts[:] = packed_anew(parts, repack().parts)
                is_stale = False
            view = self._view(method, parts[number])
            return self._step(method, parts[number], view, trains_policy=trains_policy)

        def undo() -> None:
            nonlocal is_stale
            is_stale = True
            if generator is not None and state is not None:
                generator.set_state(state)

        def can_redo() -> bool:
            return repack is not None and num_begun < now == self.learner.num_begun

        return self.recovery.redone(attempt, can_redo=can_redo, undo=undo)

    def _step(
        self, method: Method, part: MiniBatch, view: Measured, *, trains_policy: bool
    ) -> Done:
        """One optimizer step of policy and value model, or neither if anything is not finite."""
        hidden = view.hidden_states
        ready = prepare(method, part.inputs, part.passes, view.statistics, trim=hidden is None)
        measured = work_of(part.passes if view.statistics else [], runs_layers=hidden is None)
        done = Done(ready, [], [], trained_advantages(part.inputs, ready), measured)
        if not ready.passes:
            return done
        backward = PassBackward(
            self.policy, ready, self.temperature, hidden, critic=self.critic,
            value_choice=method.value_loss, trains_policy=trains_policy,
            workspace_mb=self.config.workspace_mb,
        )  # fmt: skip
        try:
            norm = self.learner.step(len(ready.passes), backward, trains_policy=trains_policy)
        except NotFiniteError as error:
            self.learner.count_skipped(error)
            return done._replace(num_skipped=1)
        self.learner.skipped_in_a_row = 0
        losses = [found.policy for found in backward.losses if found.policy is not None]
        logps = [found.logps for found in losses]
        return done._replace(
            ready=ready._replace(passes=with_old_logps(ready.passes, logps)) if logps else ready,
            losses=losses,
            values=[found.values for found in backward.losses if found.values is not None],
            loss=step_loss(ready, losses) if losses else 0.0,
            grad_norm=norm,
        )


def look_ahead(method: Method) -> tuple[int, float]:
    """Fast iterations before the last one and the way back in between; 0 and 0.0 for none."""
    if method.look_ahead is None:
        return 0, 0.0
    known = hyper_parameters_of("look_ahead", method.look_ahead.name)
    found = {**known, **method.look_ahead.parameters}
    way_back = float(found["way_back"])
    return (int(found["fast_steps"]), way_back) if way_back else (0, 0.0)


def critic_warmup_steps(method: Method) -> int:
    """Steps at the beginning of a run in which the value model is trained alone."""
    if method.value_loss is None:
        return 0
    return round(training_parameter(method.value_loss, "critic_warmup_steps"))
