"""What a completions server answers, checked against the policy's own tokenizer.

Legend: C completion length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.policy import Policy
from fastrl.rollout import Sampling
from fastrl.rollout.completions import Completion, Ends

TOKEN_PREFIX = "token_id:"  # how vLLM spells a token with return_tokens_as_token_ids


class Answers:
    """Reads completions out of answers; an answer that does not fit the policy is an InputError."""

    def __init__(self, policy: Policy, ends: Ends, sampling: Sampling, url: str) -> None:
        self._tokenizer = policy.tokenizer
        self._num_tokens = policy.model.config.get_text_config().vocab_size
        self._ends = ends
        self._most = sampling.max_completion_length
        self._url = url

    def from_ids(self, answer: Any, prompt_ids: Tensor, count: int) -> list[Completion]:
        """That many completions from an answer with token ids and log-probabilities."""
        return [self._completion(choice, prompt_ids) for choice in self._choices(answer, count)]

    def from_text(self, answer: Any, prompt_ids: Tensor, count: int) -> list[Completion]:
        """That many completions from an answer with nothing but text, which is tokenised again."""
        usage = answer.get("usage") if isinstance(answer, dict) else None
        completions = []
        for choice in self._choices(answer, count):
            text = choice.get("text")
            if not isinstance(text, str) or not isinstance(usage, dict):
                raise self._wrong("a choice without text, or an answer without usage")
            if usage.get("prompt_tokens") != len(prompt_ids):
                raise self._wrong(
                    f"a prompt of {usage.get('prompt_tokens')} tokens where it has "
                    f"{len(prompt_ids)}; its tokenizer is another one"
                )
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            num_silent = usage.get("completion_tokens", 0) - len(ids)
            # One token may leave no text: the end of the sequence, or the one past the limit.
            if num_silent not in (0, 1):
                raise self._wrong(
                    f"{usage.get('completion_tokens')} tokens whose text {text[:80]!r} makes "
                    f"{len(ids)} tokens when tokenised again; use one that returns token ids"
                )
            if num_silent == 1 and choice.get("finish_reason") == "stop":
                ids = [*ids, self._tokenizer.eos_token_id]
            completions.append(self._ended(torch.tensor(ids[: self._most]).long(), None))
        return completions

    def _choices(self, answer: Any, count: int) -> list[dict[str, Any]]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(each, dict) for each in choices):
            raise self._wrong("no list of choices")
        if len(choices) != count:
            raise self._wrong(f"{len(choices)} choices where {count} were asked for")
        return choices

    def _completion(self, choice: dict[str, Any], prompt_ids: Tensor) -> Completion:
        recorded = choice.get("logprobs") or {}
        ids, values = self._ids(choice, recorded), recorded.get("token_logprobs")
        if not values or not all(isinstance(value, int | float) for value in values):
            raise self._wrong(
                "no log-probabilities (choices[].logprobs.token_logprobs); let it return them, or "
                "set rollout.engine_args.logps = 'none' and do without"
            )
        if len(values) != len(ids):
            raise self._wrong(f"{len(values)} log-probabilities for {len(ids)} tokens")
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != prompt_ids.tolist():
            raise self._wrong("other prompt tokens than those it was sent")
        self._check_text(choice.get("text"), ids)
        return self._ended(ids, torch.tensor(values, dtype=torch.float32))

    def _ids(self, choice: dict[str, Any], recorded: dict[str, Any]) -> Tensor:
        ids = choice.get("token_ids")
        if ids is None:
            spelt = recorded.get("tokens") or [""]
            if not all(str(token).startswith(TOKEN_PREFIX) for token in spelt):
                raise self._wrong(
                    "no token ids (choices[].token_ids); it must know return_token_ids, as vLLM "
                    "does, or set rollout.engine_args.logps = 'none'"
                )
            ids = [int(token.removeprefix(TOKEN_PREFIX)) for token in spelt]
        if not ids or not all(isinstance(token, int) for token in ids):
            raise self._wrong("a completion without a token")
        if min(ids) < 0 or max(ids) >= self._num_tokens:
            raise self._wrong(
                f"token {max(ids)} but the policy has {self._num_tokens}; it serves another model"
            )
        return torch.tensor(ids, dtype=torch.int64)

    def _check_text(self, text: Any, ids: Tensor) -> None:
        """White space, and bytes that are no character yet, are written in several ways.

        A server may also keep back an unfinished character of the completion's end, or put the
        prompt's before its start.
        """
        if not isinstance(text, str):
            return
        own = self._tokenizer.decode(ids, skip_special_tokens=False)
        expected, found = _essence(own), _essence(text)
        if not (expected.startswith(found) or found.endswith(expected)):
            raise self._wrong(
                f"text {text[:80]!r} for tokens that are {own[:80]!r} to the policy; its tokenizer "
                "is another one"
            )

    def _ended(self, ids: Tensor, logps: Tensor | None) -> Completion:
        completion = self._ends.cut(ids, logps)
        if not completion.finished and len(ids) != self._most:
            raise self._wrong(
                f"a completion of {len(ids)} tokens that ends neither with one of the policy's "
                f"ends nor at max_completion_length = {self._most}; compare its generation_config "
                "and its longest context"
            )
        return completion

    def _wrong(self, what: str) -> InputError:
        return InputError(f"the server at {self._url} returned {what}")


def _essence(text: str) -> str:
    return "".join(text.replace("\ufffd", "").split())
