"""What sampling takes at its highest: in a step, and in an evaluation.

Legend: P prompts, G completions of a prompt, R rows, L tokens of a prompt, C of a completion.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.config import Config
from fastrl.evaluate import PROMPTS_PER_BATCH
from fastrl.integrations.capabilities import decoder_of, without_wrappers
from fastrl.memory.engine_moments import Call
from fastrl.memory.engines import OTHERS, Setting, highest_moment
from fastrl.memory.model import Fewer, fewer_layers, layers_of
from fastrl.memory.plan import Phase
from fastrl.memory.work import method_of
from fastrl.methods.axes import AXES
from fastrl.methods.record import Method
from fastrl.rollout import Sampling
from fastrl.sampling_settings import sampling_of
from fastrl.tasks.jsonl import EVAL_SIZE
from fastrl.values.kinds import ReferenceRollouts
from fastrl.values.reference import PROMPTS_PER_BATCH as REFERENCES_PER_BATCH

if TYPE_CHECKING:
    from fastrl.memory.survey import Survey

ALIKE = 3
"""Of layers that are all alike: the first, whose input stays, the last, and one between them."""
TABLE_BYTES = 8 + 3 * 4
"""Of a token in an engine's table: its id, two log-probabilities and an entropy."""


def rollout_phases(survey: Survey, config: Config) -> tuple[Phase, ...]:
    """Phases "rollout" and "evaluate" of the config, of completions as long as they may become."""
    method = method_of(config)
    sampling = sampling_of(config, method)
    settings = config.eval
    held_out = replace(
        sampling, num_generations=settings.num_samples, temperature=settings.temperature
    )
    resident = survey.resident(config)
    before = {part: size for part, size in resident.items() if part != "optimizer"}
    found = [
        _with(resident, survey, config, sampling, call) for call in _step_calls(config, method)
    ]
    # What is sampled before the first step finds no states of the optimizer yet.
    found += [
        _with(before, survey, config, replace(sampling, num_generations=call.num_generations), call)
        for call in _value_calls(config, method)
    ]
    call = Call(*_held_out(config), *_lengths(config))
    evaluation = _with(resident, survey, config, held_out, call)
    highest = max(found, key=lambda parts: sum(parts.values()))
    return Phase("rollout", highest), Phase("evaluate", evaluation)


def _with(
    resident: Mapping[str, int], survey: Survey, config: Config, sampling: Sampling, call: Call
) -> Mapping[str, int]:
    """What is there all the time and what one call of the engine takes beside it."""
    # What trains is nothing to sampling: plans that differ in that alone share what is found.
    plain = replace(
        config.model, gradient_checkpointing=False, activation_offloading=False, reference="auto"
    )
    config = replace(config, model=plain)
    key = ("sampling", repr(plain), repr(config.rollout), config.memory_limit, sampling, call)
    found = Counter(resident)
    found.update(
        survey.once(key, lambda: highest_moment(setting_of(survey, config, sampling), call))
    )
    found["sampling"] += call.num_rows * call.completion_length * TABLE_BYTES
    return {part: size for part, size in found.items() if size}


def setting_of(survey: Survey, config: Config, sampling: Sampling) -> Setting:
    """With as few layers as tell what all of them take."""
    whole = survey.policy(config)
    fewer = survey.once(("layers", repr(config.model)), lambda: _fewer(whole.model))
    few, more = (survey.policy(config, num_layers=count) for count in fewer)
    if config.rollout.engine_args.get("fold_adapters"):
        few, more = copy.copy(few), copy.copy(more)  # runs are remembered by policy
    turn = fewer.second - fewer.first
    num_layers = survey.architecture.get_text_config().num_hidden_layers
    num_turns = (num_layers - fewer.first) // turn if turn else 0
    return Setting(config, sampling, survey.device, whole, few, more, turn, num_turns)


def _fewer(model: Any) -> Fewer:
    """As few layers as meet the highest moment, and one of every kind more."""
    layers = layers_of(model)
    if layers is None or len(layers) <= ALIKE:
        return fewer_layers(model)
    kinds = getattr(decoder_of(without_wrappers(model)).config, "layer_types", None) or ()
    is_alike = len(set(kinds)) <= 1 and len(set(map(str, layers))) == 1
    return Fewer(ALIKE, ALIKE + 1) if is_alike else fewer_layers(model)


def _step_calls(config: Config, method: Method) -> Iterator[Call]:
    """Those of one step; a conversation's later answers are sampled one a completion."""
    num_generations = config.rollout.num_generations
    yield Call(config.prompts_per_step, num_generations, *_lengths(config))
    if method.draws_turn:
        yield Call(config.prompts_per_step * num_generations, 1, *_lengths(config))


def _value_calls(config: Config, method: Method) -> Iterator[Call]:
    """Those for what a method asks to know of prompts before it trains."""
    choice = method.prompt_values
    if choice is None:
        return
    settings = AXES["prompt_values"][choice.name](**choice.parameters)
    if isinstance(settings, ReferenceRollouts):
        num_prompts = min(REFERENCES_PER_BATCH, config.max_steps * config.prompts_per_step)
        num_samples = settings.num_samples or config.rollout.num_generations
        yield Call(num_prompts, num_samples, *_lengths(config))


def _held_out(config: Config) -> tuple[int, int]:
    """Prompts of a batch of the evaluation, and samples of each."""
    num_prompts, path = config.data.eval_size, config.data.eval_path
    if num_prompts is None and path is not None and Path(path).is_file():
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        num_prompts = sum(bool(line.strip()) for line in lines)
    num_prompts = EVAL_SIZE if num_prompts is None else num_prompts
    return max(min(num_prompts, PROMPTS_PER_BATCH), 1), config.eval.num_samples


def _lengths(config: Config) -> tuple[int, int]:
    return config.rollout.max_prompt_length, config.rollout.max_completion_length


def rollout_notes(config: Config) -> tuple[str, ...]:
    """What the two phases leave out or only estimate."""
    found = []
    engine = config.rollout.engine
    if engine in OTHERS:
        found.append(
            f"rollout and evaluate leave out engine {engine!r}, a program with memory of its own"
        )
    if engine == "hf_cb":
        found.append("what transformers' continuous batching takes is an estimate")
    if config.rollout.engine_args.get("cuda_graphs"):
        found.append("the memory that CUDA graphs keep is left out")
    return tuple(found)
