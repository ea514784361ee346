"""Tiny real parts that tests share: models, tokenizers, ragged token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fastrl.policy import Policy, train_tokenizer
from fastrl.types import Example, Prompts, Rollouts

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
TEXTS = [f"What is {a} + {b}? {a + b}" for a in range(12) for b in range(12)]


def tiny_model(
    model_type: str = "qwen3", *, vocab_size: int = 61, dtype: torch.dtype = torch.float64,
    seed: int = 0, **fields: Any,
) -> Any:  # fmt: skip
    """A random model with weights large enough that attention is far from uniform."""
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size, **{**ids, **TINY, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def with_float64_norms(model: Any) -> Any:
    """The model with norms that stay in float64; transformers' own round to float32 in between."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def tiny_policy(*, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Policy:
    """A random policy with a tokenizer that really reads and writes the task's text."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(vocab_size=len(tokenizer), dtype=dtype, seed=seed, **ids, **fields)
    return Policy(model, tokenizer)


def random_ids(lengths: Sequence[int], *, seed: int = 0, vocab_size: int = 61) -> list[Tensor]:
    """One int64 vector a length, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths]


def random_rollouts(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], *, seed: int = 0,
    vocab_size: int = 61,
) -> Rollouts:  # fmt: skip
    """Rollouts of the given shape with random tokens; the same G for every prompt."""
    flat = [length for group in completion_lengths for length in group]
    prompts = tuple(random_ids(prompt_lengths, seed=seed, vocab_size=vocab_size))
    return Rollouts(
        prompts=Prompts(prompts, tuple(Example(prompt="x") for _ in prompts)),
        completion_ids=tuple(random_ids(flat, seed=seed + 1, vocab_size=vocab_size)),
        rollout_logps=None,
        finished=torch.ones(len(flat), dtype=torch.bool),
    )


def checksum(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that differs from completion to completion even for a policy that knows nothing."""
    return [sum(map(ord, completion)) % 7 / 6 for completion in completions]
