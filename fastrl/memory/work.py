"""What a step has to compute: sizes of its model, tokens of its passes at their longest.

Legend: P prompt tokens, R completion tokens, G completions of a prompt, D hidden, V vocabulary, L
layers, H heads, K head size, I width inside an MLP.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrl.activations import head_row_cost
from fastrl.config import Config
from fastrl.config_io import objective_of
from fastrl.integrations.bare_models import model_config
from fastrl.methods.record import Method
from fastrl.methods.resolve import resolve_method
from fastrl.packing.groups import MIN_TOKEN_RATIO
from fastrl.packing.passes import split_into_passes
from fastrl.precision import frozen_dtype, trained_dtype

ROUND = 16
"""Budgets of a pass are multiples of it."""


def method_of(config: Config) -> Method:
    """The method that a configuration trains by."""
    key = (config.method, repr(config.objective))
    if key not in _methods:
        _methods[key] = resolve_method(config.method, objective_of(config))
    return _methods[key]


_methods: dict[tuple[str, str], Method] = {}


class ModelSizes(NamedTuple):
    """Values of the model's matrices, from its transformers config."""

    config: Any
    num_layers: int  # L
    hidden: int  # D
    vocab: int  # V
    attention_width: int  # H K
    kv_width: int  # of keys alone
    layer_values: int  # that a token is multiplied with in all layers
    mlp_values: int  # those of them in MLPs
    num_parameters: int
    lora_width: int  # inputs and outputs of all matrices in the layers: r times that is an adapter

    @property
    def head_values(self) -> int:
        """V D"""
        return self.vocab * self.hidden


def sizes_of(config: Config) -> ModelSizes:
    """Of the model that the config names; no weights are read."""
    model = config.model
    source = Path(model.path) if model.path is not None else model.architecture
    whole = model_config(source)
    text = whole.get_text_config()
    D, L, V = text.hidden_size, text.num_hidden_layers, text.vocab_size
    H = text.num_attention_heads
    K = getattr(text, "head_dim", None) or D // H
    kv = (getattr(text, "num_key_value_heads", None) or H) * K
    I, num_matrices = _mlp_of(text)  # noqa: E741
    used = getattr(text, "num_experts_per_tok", None) or 1
    stored = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    attention = D * (2 * H * K + 2 * kv)
    mlp = num_matrices * D * I
    ends = V * D * (1 if getattr(text, "tie_word_embeddings", True) else 2)
    return ModelSizes(
        whole, L, D, V, H * K, kv,
        layer_values=L * (attention + used * mlp),
        mlp_values=L * used * mlp,
        num_parameters=L * (attention + stored * mlp) + ends,
        lora_width=L * (4 * D + 2 * H * K + 2 * kv + num_matrices * (D + I)),
    )  # fmt: skip


def _mlp_of(text: Any) -> tuple[int, int]:
    """I, and how many matrices of D I an MLP or an expert has."""
    if getattr(text, "num_experts_per_tok", None):
        width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        return int(width), 3
    width = getattr(text, "intermediate_size", None)
    if width is None:  # gpt2 and its kin have no gate
        return int(getattr(text, "n_inner", None) or 4 * text.hidden_size), 2
    return int(sum(width) / len(width) if isinstance(width, list) else width), 3


class Pass(NamedTuple):
    """One forward and backward pass."""

    num_tokens: int  # through the layers
    num_rows: int  # at the head


class StepWork(NamedTuple):
    """An optimizer step with every completion at its longest, cut as the trainer would."""

    passes: tuple[Pass, ...]
    num_steps: int  # optimizer steps of a training step

    @property
    def num_tokens(self) -> int:
        """Of all passes."""
        return sum(x.num_tokens for x in self.passes)

    @property
    def num_rows(self) -> int:
        """Of all passes."""
        return sum(x.num_rows for x in self.passes)


def layer_dtype(config: Config) -> torch.dtype:
    """What layers compute in, which keys and values are kept in."""
    return torch.float32 if config.model.precision == "float32" else torch.bfloat16


def row_cost(config: Config, sizes: ModelSizes) -> float:
    """`head_row_cost` of the trainer that the config would build."""
    model = config.model
    weights = (frozen_dtype if model.lora else trained_dtype)(model.precision)
    return head_row_cost(
        sizes.config,
        bf16=model.precision != "float32",
        is_checkpointed=model.gradient_checkpointing,
        has_bf16_stream=weights == torch.bfloat16,
        is_offloaded=model.activation_offloading,
        has_chunked_mlps=model.mlp_chunk_size > 0,
        head_dtype=torch.float32 if model.cast_lm_head_to_fp32 else weights,
    )


def budgets(config: Config, sizes: ModelSizes) -> tuple[int, int]:
    """Values of max_tokens_per_pass that hold one prompt and completion, and a whole step."""
    rollout, cost = config.rollout, row_cost(config, sizes)
    P, R = rollout.max_prompt_length, rollout.max_completion_length
    G = rollout.num_generations
    completion = R - 1 + cost * R
    group = P + G * completion if _is_shared(P, R, G) else G * (P + completion)
    most = _prompts_of_a_step(config)[0] * group
    # A pass that is cut from several groups may start each with a prompt: never less than that.
    return _rounded(P + completion), _rounded(most)


def work_of(config: Config, sizes: ModelSizes) -> StepWork:
    """With the config's own budget, which has to hold one prompt and completion."""
    rollout, cost = config.rollout, row_cost(config, sizes)
    P, R = rollout.max_prompt_length, rollout.max_completion_length
    G = rollout.num_generations
    num_prompts, num_steps = _prompts_of_a_step(config)
    is_shared = _is_shared(P, R, G)
    groups = [[R] * G] * num_prompts if is_shared else [[R]] * (num_prompts * G)
    parts = split_into_passes(
        [P] * len(groups), groups, max_tokens_per_pass=config.max_tokens_per_pass,
        head_row_cost=cost,
    )  # fmt: skip
    passes = []
    for pairs in parts:
        members = [len(members) for _, members in pairs if members]
        tokens = len(members) * P + sum(members) * (R - 1)
        passes.append(Pass(tokens, sum(members) * R))
    return StepWork(tuple(passes), num_steps * config.num_iterations)


def _is_shared(P: int, R: int, G: int) -> bool:
    return G * (P + R - 1) >= MIN_TOKEN_RATIO * (P + G * (R - 1))


def _prompts_of_a_step(config: Config) -> tuple[int, int]:
    """Of the largest mini-batch, and how many there are."""
    num_parts = min(config.num_mini_batches, config.prompts_per_step)
    return math.ceil(config.prompts_per_step / num_parts), num_parts


def _rounded(num_tokens: float) -> int:
    return math.ceil(num_tokens / ROUND) * ROUND
