"""What a run's engine is, what it is told to draw, and what it does when memory runs out."""

from __future__ import annotations

from fastrl.config import Config
from fastrl.memory.recovery import Recovery
from fastrl.methods.record import Method
from fastrl.policy import Policy
from fastrl.rollout import Engine, Sampling, make_engine
from fastrl.rollout.native import NativeEngine
from fastrl.thinking import thinking_limit


def engine_of(config: Config, policy: Policy, recovery: Recovery) -> Engine:
    """The engine that the configuration names, which shares what the run knows of memory."""
    engine = make_engine(config.rollout.engine, policy, config.rollout.engine_args)
    if isinstance(engine, NativeEngine):
        engine.recovery = recovery
        engine.largest_group = largest_group(config)
    return engine


def largest_group(config: Config) -> int:
    """Tokens of the longest prompt with its completions at their longest, in any call."""
    rollout = config.rollout
    num_rows = max(rollout.num_generations, config.eval.num_samples)
    if rollout.max_tokens_per_step is not None:
        num_rows += 1  # what has been drawn counts as a prompt where a completion goes on
    return rollout.max_prompt_length + num_rows * rollout.max_completion_length


def sampling_of(config: Config, method: Method) -> Sampling:
    """How completions of a step are drawn."""
    rollout = config.rollout
    return Sampling(
        num_generations=rollout.num_generations,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        stop_strings=rollout.stop_strings,
        thinking=thinking_limit(method),
    )
