"""Conversations whose user messages are given beforehand, and every answer in them the policy's.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from fastrl.config import Config, RolloutConfig
from fastrl.encoding import Tokenizer, decode_completions
from fastrl.errors import InputError
from fastrl.methods.record import Method
from fastrl.rollout import Engine, Sampling
from fastrl.sampler import Generated
from fastrl.tasks import Task
from fastrl.tasks.prompt import prompt_start
from fastrl.types import Example, Message, Prompts, Rollouts, StepMetrics

Answer = Callable[[Sequence[Example]], Generated]
"""The policy's answers to what stands last in each conversation, one for each."""
PLACEHOLDER = "..."
"""An answer, where a conversation is looked at before there is any."""


class Turn(NamedTuple):
    """Where in a conversation one is."""

    number: int  # from 1
    num_turns: int


def turn_of(drawn: Example, asked: Example) -> Turn:
    """Where `asked` is in a conversation of which `drawn` is the beginning."""
    num_turns = 1 + len(drawn.later_turns)
    return Turn(num_turns - len(asked.later_turns), num_turns)


def with_answer(example: Example, text: str) -> Example:
    """The conversation after an answer, its next user message asked."""
    assert isinstance(example.prompt, list), "a conversation is a chat"
    question, *later = example.later_turns
    answered = {"role": "assistant", "content": text}
    asked = {"role": "user", "content": question}
    return replace(example, prompt=[*example.prompt, answered, asked], later_turns=tuple(later))


def answers_of(
    engine: Engine, tokenizer: Tokenizer, encode: Callable[[Sequence[Example]], Prompts],
    sampling: Sampling, generator: torch.Generator,
) -> Answer:  # fmt: skip
    """Answers by an engine, sampled like completions; each call draws on from `generator`."""
    one_each = replace(sampling, num_generations=1)

    def answer(examples: Sequence[Example]) -> Generated:
        rollouts = engine.generate(encode(examples), one_each, generator)
        return Generated(rollouts, decode_completions(rollouts.completion_ids, tokenizer))

    return answer


def draw_turns(examples: Sequence[Example], generator: torch.Generator) -> list[int]:
    """A turn of each conversation, from 0, all of its turns equally likely."""
    return [
        int(torch.randint(1 + len(example.later_turns), (), generator=generator))
        for example in examples
    ]


def roll_in(examples: Sequence[Example], turns: Sequence[int], answer: Answer) -> list[Example]:
    """Each conversation at its turn, from 0, with the policy's answers to those before."""
    found = list(examples)
    for turn in range(max(turns)):
        rows = [row for row, last in enumerate(turns) if last > turn]
        _, texts = answer([found[row] for row in rows])
        for row, text in zip(rows, texts, strict=True):
            found[row] = with_answer(found[row], text)
    return found


def roll_out(completions: Generated, answer: Answer) -> Generated:
    """The last answers of the B conversations that the completions go on as, G = 1.

    Where no user message is still to come these are the completions as they are, of their groups.
    """
    rollouts, texts = completions
    num_generations = rollouts.num_generations
    if not any(example.later_turns for example in rollouts.prompts.examples):
        return completions
    owners = [row // num_generations for row in range(len(texts))]
    examples = [rollouts.prompts.examples[prompt] for prompt in owners]
    prompt_ids = [rollouts.prompts.token_ids[prompt] for prompt in owners]
    completion_ids, finished = list(rollouts.completion_ids), rollouts.finished.tolist()
    texts = list(texts)
    while rows := [row for row, example in enumerate(examples) if example.later_turns]:
        asked = [with_answer(examples[row], texts[row]) for row in rows]
        answered = answer(asked)
        for place, row in enumerate(rows):
            examples[row] = asked[place]
            prompt_ids[row] = answered.rollouts.prompts.token_ids[place]
            completion_ids[row] = answered.rollouts.completion_ids[place]
            finished[row] = bool(answered.rollouts.finished[place])
            texts[row] = answered.texts[place]
    ended = Rollouts(
        prompts=Prompts(tuple(prompt_ids), tuple(examples)),
        completion_ids=tuple(completion_ids),
        rollout_logps=None,
        finished=torch.tensor(finished),
    )
    return Generated(ended, texts)


def as_recorded(example: Example, recorded: str | list[Message]) -> Example:
    """The conversation at the turn whose prompt was recorded, with the answers in that."""
    if isinstance(recorded, str):
        return example
    for message in recorded[len(example.prompt) :: 2]:
        if not example.later_turns:
            break
        example = with_answer(example, message["content"])
    return example


def turn_metrics(turns: Sequence[Turn]) -> StepMetrics:
    """Means of the turn that is trained, from 1, and of how many there are."""
    if not turns:
        return {}
    return {
        "conversations/turn": sum(turn.number for turn in turns) / len(turns),
        "conversations/num_turns": sum(turn.num_turns for turn in turns) / len(turns),
    }


def to_the_last_turn(example: Example) -> Example:
    """The conversation with all that the user says and nothing in between."""
    while example.later_turns:
        example = with_answer(example, PLACEHOLDER)
    return example


def check_conversations(config: Config, method: Method, task: Task) -> None:
    """Raise InputError where there are conversations of several turns that nobody can train on."""
    known = [task.train_example(0), *task.known_examples()]
    found = next((example for example in known if example.later_turns), None)
    if found is None:
        return
    what = f"{task.name} has conversations of several turns, such as {prompt_start(found.prompt)}"
    if not method.draws_turn:
        raise InputError(
            f"{what}, but method {method.name!r} trains on the answer to a prompt; use method "
            "'refuel', or records with 'prompt' or 'messages'"
        )
    if config.warm_start.steps:
        raise InputError(
            f"{what}, which have no reference answer before their last turn; set warm_start.steps "
            "= 0"
        )


def check_contexts(
    examples: Sequence[Example], encode: Callable[[Sequence[Example]], Prompts],
    limits: RolloutConfig,
) -> None:  # fmt: skip
    """Raise InputError where answers of the largest length would not fit before the last turn."""
    several = [example for example in examples if example.later_turns]
    asked = encode([to_the_last_turn(example) for example in several])
    for example, ids in zip(several, asked.token_ids, strict=True):
        num_answers = len(example.later_turns)
        longest = len(ids) + num_answers * limits.max_completion_length
        if longest > limits.max_prompt_length:
            raise InputError(
                f"the conversation {prompt_start(example.prompt)} can have {longest} tokens before "
                f"its last answer, {num_answers} answers of max_completion_length="
                f"{limits.max_completion_length} among them, more than max_prompt_length="
                f"{limits.max_prompt_length}; raise that, or allow shorter answers or fewer turns"
            )
