"""Between text and tokens: prompts in, completions out, reference answers for a warm start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.tasks.prompt import prompt_start
from fastrl.types import Example, Message, Prompts


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer, which is given and never loaded here."""

    chat_template: Any
    eos_token: Any
    eos_token_id: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any: ...
    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any: ...
    def batch_decode(self, sequences: list[list[int]], **options: Any) -> Any: ...


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    chat_template: bool | None,
) -> Prompts:
    """The examples' prompts as tokens, ready for the model to continue.

    chat_template: whether to wrap a string prompt as one user message; None means wherever the
    tokenizer has a template. max_prompt_length: tokens; a longer prompt is an error, never cut.
    """
    has_template = tokenizer.chat_template is not None
    if chat_template and not has_template:
        raise InputError(
            "chat_template=True needs a tokenizer with a chat template, and this one has none; use "
            "an instruction-tuned model or set chat_template to false"
        )
    use_template = has_template and chat_template is not False
    token_ids = []
    for example in examples:
        ids = _prompt_ids(example.prompt, tokenizer, use_template=use_template)
        if not 0 < len(ids) <= max_prompt_length:
            raise InputError(
                f"a prompt must have 1 to max_prompt_length={max_prompt_length} tokens, got "
                f"{len(ids)} for {prompt_start(example.prompt)}; raise max_prompt_length or remove "
                "the prompt"
            )
        token_ids.append(torch.tensor(ids, dtype=torch.int64))
    return Prompts(token_ids=tuple(token_ids), examples=tuple(examples))


def decode_completions(completion_ids: Sequence[Tensor], tokenizer: Tokenizer) -> list[str]:
    """The text of each completion without special tokens, spaces untouched."""
    texts: list[str] = tokenizer.batch_decode(
        [ids.tolist() for ids in completion_ids],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return texts


def encode_solution(
    example: Example, tokenizer: Tokenizer, *, max_completion_length: int
) -> Tensor:
    """The reference answer as a completion: its tokens and the end-of-sequence token, int64."""
    if example.answer is None:
        raise InputError(
            f"the prompt {prompt_start(example.prompt)} has no reference answer to learn "
            "from; give it an answer or do without the warm start"
        )
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos_token to end an answer with; set its eos_token")
    ids = [*tokenizer(example.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if len(ids) > max_completion_length:
        raise InputError(
            f"the reference answer of {prompt_start(example.prompt)} takes {len(ids)} tokens with "
            f"its end, more than max_completion_length={max_completion_length}; raise it"
        )
    return torch.tensor(ids, dtype=torch.int64)


def _prompt_ids(
    prompt: str | list[Message], tokenizer: Tokenizer, *, use_template: bool
) -> list[int]:
    if not use_template:
        if not isinstance(prompt, str):
            raise InputError(
                f"the prompt {prompt_start(prompt)} is a chat, which needs a tokenizer with a chat "
                "template and chat_template not false; use an instruction-tuned model or give the "
                "prompt as a string, without a system_prompt"
            )
        return _text_ids(prompt, tokenizer)
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise InputError(
            f"the tokenizer's chat template refuses the prompt {prompt_start(prompt)}: "
            f"{' '.join(str(error).split())}; change the messages' roles or set chat_template to "
            "false"
        ) from error
    return ids


def _text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text with the tokenizer's special tokens, but not ended by it."""
    ids: list[int] = tokenizer(text).input_ids
    ends_itself = tokenizer.eos_token is not None and text.endswith(tokenizer.eos_token)
    if ids and ids[-1] == tokenizer.eos_token_id and not ends_itself:
        return ids[:-1]
    return ids
