"""The first half of a step: prompts, their completions, and what these are worth.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from fastrl.carried import (
    InFlight,
    ResumingEngine,
    advance,
    begun,
    side_by_side,
    staleness_metrics,
)
from fastrl.config import Config
from fastrl.conversations import (
    Answer,
    Turn,
    answers_of,
    draw_turns,
    roll_in,
    roll_out,
    turn_metrics,
    turn_of,
)
from fastrl.encoding import decode_completions, encode_prompts
from fastrl.memory.recovery import Recovery
from fastrl.methods.inputs import StepInputs
from fastrl.methods.record import Method
from fastrl.phase_clock import PhaseClock
from fastrl.policy import Policy
from fastrl.prompt_stream import PromptStream
from fastrl.replay import Recorded, Recorder, Replay
from fastrl.rewards import Scorer
from fastrl.rewards.score import NotFiniteReward, checked
from fastrl.rollout import Sampling
from fastrl.rollout.native import NativeEngine
from fastrl.rollout_check import check_engine
from fastrl.sampler import Generated, Sampled, Scored, generate_while_scoring, sample_until_full
from fastrl.sampling_settings import engine_of, sampling_of
from fastrl.seeding import make_generator
from fastrl.tasks import Task
from fastrl.types import Example, Prompts, Rewards, Rollouts, StepMetrics
from fastrl.values.sources import PromptValues, make_values


class SamplingStage:
    """Holds where the task's prompts stand, the engine, and completions that are carried over."""

    def __init__(
        self, config: Config, policy: Policy, task: Task, scorer: Scorer, method: Method,
        recovery: Recovery,
    ) -> None:  # fmt: skip
        self.config = config
        self.policy = policy
        self.task = task
        self.scorer = scorer
        self.stream = PromptStream(
            task,
            first=config.warm_start.steps * config.warm_start.batch_size,
            max_pass_rate=method.max_pass_rate,
        )
        self.recovery = recovery
        recovery.forget = scorer.forget
        self.engine = engine_of(config, policy, recovery)
        self.sampling = sampling_of(config, method)
        self.max_sampling_rounds = method.max_sampling_rounds
        self.draws_turn = method.draws_turn
        self.values: PromptValues | None = make_values(method, self)
        """What is known of prompts beside their own group, for methods that ask for it."""
        self.carried: InFlight | None = None
        """Groups that go on in the next step; only with rollout.max_tokens_per_step."""
        self.recorder: Recorder | None = None
        """Writes down what every step sampled."""
        self.replay: Replay | None = None
        """Stands in for the engine and the rewards with what another run has written down."""
        self.recorded: list[Recorded] = []
        """The rounds of the last step."""
        self.reward_metrics: StepMetrics = {}
        """What scoring the last step met, summed over its rounds."""
        self.greedy_rewards: Tensor | None = None
        """Of the prompts of the last round, where the method asks for them."""
        self.not_finite: NotFiniteReward | None = None
        """What is wrong with the rewards of the last step, where nothing is learned from them."""
        self.turns: list[Turn] = []
        """Of conversations in the last step: the turns that were drawn."""

    def use_room(self) -> None:
        """Have the engine take as much for keys and values as memory has allowed so far."""
        if isinstance(self.engine, NativeEngine):
            self.engine.kv_cache_gib = self.recovery.kv_cache_gib

    @property
    def is_current(self) -> bool:
        """Whether what the engine records of a token is what the policy thinks of it now."""
        shares_weights = bool(getattr(self.engine, "shares_weights", False))
        is_partial = self.config.rollout.max_tokens_per_step is not None
        return shares_weights and not is_partial and not self.policy.is_half

    def check(self, method: Method, step: int) -> list[str]:
        """What there is to know of the engine; InputError if it does not sample from the policy.

        Asks two prompts, and changes nothing that a step depends on.
        """
        if self.replay is not None:
            return []
        prompts = self.encode([self.task.train_example(index) for index in range(2)])
        return check_engine(
            self.engine, self.policy, prompts, self.sampling,
            make_generator(self.policy.device, self.config.seed, "check", step), method,
            name=self.config.rollout.engine,
        )  # fmt: skip

    def sample(
        self, step: int, watch: PhaseClock, *, keeps: Callable[[Scored], Tensor] | None
    ) -> Sampled:
        """P prompts with scored completions.

        keeps: with dynamic sampling, (P,) bool: those of some prompts that are trained on; others
        are sampled in place of the rest. None: all are.
        """
        self.recorded, self.reward_metrics, self.turns = [], {}, []
        self.greedy_rewards = self.not_finite = None
        if self.values is not None and not self.values.is_ready:
            self.values.prepare()
            watch.lap("values")
        if self.config.rollout.max_tokens_per_step is not None:
            sampled = self._sample_partial(step, watch, self.config.rollout.max_tokens_per_step)
        else:
            sampled = sample_until_full(
                lambda num, number: self._sample_round(num, step, number, watch),
                keeps or _keep_all,
                num_prompts=self.config.prompts_per_step,
                max_rounds=self.max_sampling_rounds if keeps is not None else 1,
            )
        if self.recorder is not None:
            self.recorder.write(step, self.recorded)
        self.reward_metrics |= turn_metrics(self.turns)
        if self.values is not None and not sampled.is_empty and self.not_finite is None:
            self.reward_metrics |= self.values.metrics(sampled.trained.rollouts.prompts)
        return sampled

    def _sample_round(self, num_prompts: int, step: int, number: int, watch: PhaseClock) -> Scored:
        """Round `number` of a step, from 0: the next prompts, G completions of each, rewards."""
        prompts, indices = self._next_prompts(num_prompts)
        if self.draws_turn:
            prompts = self._at_turns(prompts, step, number)
        texts: list[str] | None = None
        if self.replay is not None:
            rollouts = self.replay.rollouts(step, number, prompts)
        elif self.draws_turn:  # what is scored is the end of the conversation, see _score
            generator = self._generator(step, number)
            rollouts = self.engine.generate(prompts, self.sampling, generator)
        else:
            rollouts, texts = self.generate(prompts, self.sampling, self._generator(step, number))
        watch.lap("rollout")
        scored = self._score(rollouts, step, number, watch, texts)
        places = tuple(range(num_prompts))
        self.recorded.append(Recorded(rollouts, indices, scored, places, self.greedy_rewards))
        return scored

    def _at_turns(self, prompts: Prompts, step: int, number: int) -> Prompts:
        """Each conversation at a turn drawn by chance, after the policy's own answers so far."""
        drawn = prompts.examples
        if self.replay is not None:
            asked = self.replay.asked(step, number, drawn)
        else:
            generator = make_generator(torch.device("cpu"), self.config.seed, "turn", step, number)
            turns = draw_turns(drawn, generator)
            asked = roll_in(drawn, turns, self._answers("before", step, number))
        self.turns += map(turn_of, drawn, asked)
        return self.encode(asked)

    def _answers(self, where: str, step: int, number: int) -> Answer:
        """Of the policy, before or after the turns of a round."""
        device, seed = self.policy.device, self.config.seed
        return answers_of(
            self.engine, self.policy.tokenizer, self.encode, self.sampling,
            make_generator(device, seed, "turns", where, step, number),
        )  # fmt: skip

    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator
    ) -> Generated:
        """Completions whose scores are asked for as they end."""
        return generate_while_scoring(
            self.engine, self.scorer, self.policy.tokenizer, prompts, sampling, generator
        )

    def _sample_partial(self, step: int, watch: PhaseClock, max_tokens: int) -> Sampled:
        """Groups that are under way and new ones, P together; those that end are trained on."""
        flight = self._in_flight()
        before = int(flight.rollouts.lengths.sum())
        if self.replay is not None:
            rollouts = self.replay.rollouts(step, 0, flight.rollouts.prompts)
        else:
            engine, generator = cast(ResumingEngine, self.engine), self._generator(step, 0)
            rollouts = advance(engine, flight, self.sampling, generator, max_tokens=max_tokens)
        flight = flight.advanced(rollouts, step)
        watch.lap("rollout")
        ended = flight.ended(self.sampling.max_completion_length)
        chosen, others = (mask.nonzero()[:, 0].tolist() for mask in (ended, ~ended))
        trained = flight.of_prompts(chosen) if chosen else None
        scored = Scored(rollouts, [], Rewards(torch.zeros(0), {}))
        if trained is not None:
            scored = self._score(trained.rollouts, step, 0, watch, None)
        self.carried = flight.of_prompts(others) if others else None
        places = tuple(chosen)
        self.recorded.append(
            Recorded(rollouts, flight.indices, scored, places, self.greedy_rewards)
        )
        metrics = staleness_metrics(trained, self.carried, self.sampling, step)
        num_drawn = int(rollouts.lengths.sum()) - before
        metrics["tokens_per_second/rollout"] = num_drawn / watch.laps["rollout"]
        return Sampled(scored, scored, 1, 0, metrics)

    def _in_flight(self) -> InFlight:
        """What is carried over, first in line, and as many new prompts as make P."""
        parts = [] if self.carried is None else [self.carried]
        num_new = self.config.prompts_per_step - sum(part.num_prompts for part in parts)
        if num_new:
            prompts, indices = self._next_prompts(num_new)
            parts.append(begun(prompts, indices, self.sampling))
        return side_by_side(parts)

    def _score(
        self, rollouts: Rollouts, step: int, number: int, watch: PhaseClock,
        texts: list[str] | None,
    ) -> Scored:  # fmt: skip
        """Texts and rewards of completions that have ended; solved prompts are counted."""
        if texts is None:
            texts = decode_completions(rollouts.completion_ids, self.policy.tokenizer)
        try:
            rewards = self._rewards(Generated(rollouts, texts), step, number, watch)
        except NotFiniteReward as error:
            self.not_finite, rewards = error, error.rewards
        watch.lap("score")
        scored = Scored(rollouts, texts, rewards)
        if self.not_finite is None:  # nobody learns anything from a step that is lost
            self._observe(scored, step, watch)
        return scored

    def _rewards(
        self, completions: Generated, step: int, number: int, watch: PhaseClock
    ) -> Rewards:
        """Of a round, counted in the metrics; NotFiniteReward where one is not finite."""
        if self.replay is not None:
            return checked(self.replay.rewards(step, number, completions.texts))
        if self.draws_turn:
            completions = roll_out(completions, self._answers("after", step, number))
            watch.lap("rollout")
        rewards = self.scorer.score(*completions)
        for name, value in self.scorer.metrics.items():
            self.reward_metrics[name] = self.reward_metrics.get(name, 0.0) + value
        return rewards

    def _observe(self, scored: Scored, step: int, watch: PhaseClock) -> None:
        """Remember of prompts what their rewards say."""
        prompts = scored.rollouts.prompts
        passed = scored.rewards.total >= self.config.eval.pass_threshold
        self.stream.record(prompts.examples, passed.view(len(prompts), -1))
        if self.values is not None:
            try:
                self.values.observe(scored, step)
            except NotFiniteReward as error:
                self.not_finite = error
            watch.lap("values")

    def _next_prompts(self, num_prompts: int) -> tuple[Prompts, tuple[int, ...]]:
        """The next prompts and their indices among the task's training examples."""
        drawn = self.stream.draw(num_prompts)
        return self.encode(drawn.examples), drawn.indices

    def with_values(self, inputs: StepInputs, rollouts: Rollouts) -> StepInputs:
        """The step with what its method asks to know of prompts."""
        return inputs if self.values is None else self.values.inputs(inputs, rollouts.prompts)

    def _generator(self, step: int, number: int) -> torch.Generator:
        labels = ("rollout", step, number) if number else ("rollout", step)
        return make_generator(self.policy.device, self.config.seed, *labels)

    def encode(self, examples: Sequence[Example]) -> Prompts:
        """Examples as token ids under the run's limits."""
        return encode_prompts(
            examples,
            self.policy.tokenizer,
            max_prompt_length=self.config.rollout.max_prompt_length,
            chat_template=self.config.data.chat_template,
        )


def _keep_all(scored: Scored) -> Tensor:
    return torch.ones(len(scored.rollouts.prompts), dtype=torch.bool)
