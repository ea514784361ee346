"""What the rewards of a policy's completions depend on, as a key that other runs find again."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.config import Config
from fastrl.policy import Policy
from fastrl.rewards.load import is_user_function, named_weights
from fastrl.rollout import Sampling
from fastrl.tasks import Task
from fastrl.tasks.mixture import COLUMN
from fastrl.types import Example, Prompts

FORMAT = 1
OF_FILES = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""What a model's config says of how it was saved rather than of what it computes."""


class Fingerprint(NamedTuple):
    """A key, and what it was made of."""

    key: str
    about: dict[str, Any]


def fingerprint(policy: Policy, config: Config, sampling: Sampling) -> Fingerprint:
    """Of the policy's weights and tokenizer, the rewards and the sampler; not of any prompt."""
    about = {
        "format": FORMAT,
        "weights": weights_digest(policy.model),
        "tokenizer": _tokenizer_digest(policy),
        "rewards": _rewards(config),
        "sampling": _sampling(sampling),
    }
    return Fingerprint(_digest(about), about)


def value_key(ids: Tensor, example: Example, *, has_verifier: bool) -> str:
    """Stands for a prompt, by its tokens and by what its completions are scored with.

    Columns of a generated problem repeat what its text says, with a number of its own.
    """
    columns = example.columns
    if has_verifier:
        columns = {COLUMN: columns.get(COLUMN)}
    return _digest([ids.tolist(), example.answer, dict(columns)])


def value_keys(prompts: Prompts, task: Task) -> list[str]:
    """What each prompt is known under."""
    return [
        value_key(ids, example, has_verifier=task.has_verifier)
        for ids, example in zip(prompts.token_ids, prompts.examples, strict=True)
    ]


@torch.no_grad()
def weights_digest(model: Any) -> str:
    """Of the config and of every byte of every tensor.

    An adapter that adds nothing yet is left out: a run that trains one begins with its base.
    """
    known = model.config.to_dict().items()
    fields = {key: value for key, value in known if key not in OF_FILES and key[0] != "_"}
    found = hashlib.blake2b(_text(fields), digest_size=16)
    for name, tensor in sorted(_tensors(model).items()):
        found.update(_text([name, str(tensor.dtype), list(tensor.shape)]))
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _tensors(model: Any) -> dict[str, Tensor]:
    """All tensors by name; of the base alone, by its own names, where an adapter is still zero."""
    tensors: dict[str, Tensor] = model.state_dict()
    second = [tensor for name, tensor in tensors.items() if ".lora_B." in name]
    if not second or any("modules_to_save" in name for name in tensors):
        return tensors
    if any(bool(tensor.any()) for tensor in second):
        return tensors
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if ".lora_" not in name
    }


def _tokenizer_digest(policy: Policy) -> str:
    tokenizer = policy.tokenizer
    return _digest(
        [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids),
         policy.eos_token_ids]
    )  # fmt: skip


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Its fields; without a limit on thinking those that there were before there was one."""
    found = dataclasses.asdict(sampling)
    if sampling.thinking is None:
        del found["thinking"]
    return found


def _rewards(config: Config) -> dict[str, Any]:
    """The rewards with their weights and sources; of the task what its verifier looks at."""
    named = named_weights(config.rewards, config.reward_weights)
    found: dict[str, Any] = {
        "functions": [
            [name, weight, _source_digest(spec) if is_user_function(spec) else spec]
            for spec, (name, weight) in zip(config.rewards, named, strict=True)
        ]
    }
    if "task" in config.rewards:
        found["task"] = [config.task, config.task_args, config.data.answer_tag]
    return found


def _source_digest(spec: str) -> str:
    """Of the file of a user's function; what it imports is not looked at."""
    where = spec.rpartition(":")[0]
    path: str | None = where
    if not where.endswith(".py"):
        found = importlib.util.find_spec(where)
        path = None if found is None else found.origin
    if path is None or not Path(path).is_file():
        return spec
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def _digest(value: dict[str, Any] | Sequence[Any]) -> str:
    return hashlib.blake2b(_text(value), digest_size=16).hexdigest()


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
