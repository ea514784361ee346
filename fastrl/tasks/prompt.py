"""What every kind of task does with a prompt: system prompt, identity, a short form to quote."""

from __future__ import annotations

import json

from fastrl.errors import InputError
from fastrl.example import Example, Message

START_LENGTH = 60  # characters of a prompt quoted in an error


def with_system_prompt(
    prompt: str | list[Message], system_prompt: str | None
) -> str | list[Message]:
    """The prompt with a system message in front; a string becomes [system, user] messages.

    Without a system prompt the prompt is returned as it is.
    """
    if system_prompt is None:
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt[0]["role"] == "system":
        raise InputError(
            f"system_prompt was set, but the prompt {prompt_start(prompt)} already begins with a "
            "system message; remove one of the two"
        )
    return [{"role": "system", "content": system_prompt}, *prompt]


def prompt_key(prompt: str | list[Message]) -> str:
    """A string equal for equal prompts; a plain string equals one user message of that text."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return json.dumps(messages, sort_keys=True)


def example_key(example: Example) -> str:
    """`prompt_key` of all that is asked: user messages still to come are a part of it."""
    if not example.later_turns:
        return prompt_key(example.prompt)
    assert isinstance(example.prompt, list), "a conversation is a chat"
    later = [{"role": "user", "content": text} for text in example.later_turns]
    return prompt_key([*example.prompt, *later])


def prompt_start(prompt: str | list[Message]) -> str:
    """The quoted first characters of a prompt, of its last message if it is a chat; one line."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return repr(text if len(text) <= START_LENGTH else text[: START_LENGTH - 3] + "...")
