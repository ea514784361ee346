"""What a run finds out about prompts, for methods that look beyond a completion's own group."""

from __future__ import annotations

from typing import Protocol

from fastrl.errors import InputError
from fastrl.methods.axes import AXES
from fastrl.methods.inputs import StepInputs
from fastrl.methods.needs import requirements
from fastrl.methods.record import Method
from fastrl.sampler import Scored
from fastrl.types import Prompts, StepMetrics
from fastrl.values.greedy import GreedyBaselines
from fastrl.values.kinds import GreedyCompletion, SuccessRates
from fastrl.values.reference import ReferenceValues, Stage
from fastrl.values.success_rates import TrackedRates
from fastrl.values.summary import OnBatch, ValueSummary


class PromptValues(Protocol):
    """Holds what is known of the prompts of a run."""

    @property
    def is_ready(self) -> bool:
        """Whether `prepare` has been called."""
        ...

    def prepare(self, on_batch: OnBatch | None = None) -> ValueSummary | None:
        """What has to be known before the first step."""
        ...

    def observe(self, scored: Scored, step: int) -> None:
        """What a round of completions shows of its prompts; called before `inputs` asks for it."""
        ...

    def inputs(self, inputs: StepInputs, prompts: Prompts) -> StepInputs:
        """The step with what is known of its prompts."""
        ...

    def metrics(self, prompts: Prompts) -> StepMetrics:
        """What is known of the prompts of a step, for the logs."""
        ...


def make_values(method: Method, stage: Stage) -> PromptValues | None:
    """The values that a method asks for; None where a completion's own group is enough."""
    choice = method.prompt_values
    if choice is None:
        return None
    settings = AXES["prompt_values"][choice.name](**choice.parameters)
    draws_more = method.dynamic_sampling or method.max_pass_rate is not None
    if isinstance(settings, GreedyCompletion):
        return GreedyBaselines(stage)
    if isinstance(settings, SuccessRates):
        return TrackedRates(stage, settings, draws_more=draws_more)
    values = ReferenceValues(stage, settings, draws_more=draws_more)
    num_samples, num_generations = values.sampling.num_generations, stage.sampling.num_generations
    one_each = "ref_rewards" in requirements(method) and "ref_groups" not in requirements(method)
    if one_each and num_samples != num_generations:
        raise InputError(
            f"{method.advantage} compares each completion with one of the reference: num_samples "
            f"must be rollout.num_generations, {num_generations}, or 0 for as many, got "
            f"{num_samples}"
        )
    return values
