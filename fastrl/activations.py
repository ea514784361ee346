"""What training keeps in memory for a packed token, and for a trained token's row at the head.

Legend: D hidden, L layers, I width inside an MLP, A widths of queries, keys and values together.
"""

from __future__ import annotations

import math
from typing import Any

import torch

SCALARS_BYTES = 64
"""Of a row at the head: ids, advantage, weight, old and new log-probability, entropy, slope."""
INPUTS_ON_DEVICE = 3
"""Of checkpointed layers whose inputs are kept on the CPU: two that leave and one in use."""


def head_row_cost(
    config: Any, *, bf16: bool, is_checkpointed: bool, has_bf16_stream: bool = False,
    is_offloaded: bool = False, has_chunked_mlps: bool = False,
    head_dtype: torch.dtype = torch.float32,
) -> float:  # fmt: skip
    """What a trained token's row at the head keeps until backward, in packed tokens of the model.

    config: that of a transformers model. bf16: layers compute in bfloat16. has_bf16_stream: so is
    the sum that runs through them, as their weights are. is_offloaded: inputs of checkpointed
    layers are on the CPU.

    A row at the head keeps its hidden state and the gradient of that, 2 D of the head's dtype, and
    a few scalars; its logits are never stored. A packed token keeps in each layer about 8 D around
    the residual stream and the norms (float32; half as many bytes where that stream is bfloat16),
    and 3 A + 4 I in attention and MLP (bfloat16 under `bf16`), 4 I + 2 D for each expert that it
    visits. With gradient checkpointing it keeps D for each layer and all of that for one; with the
    inputs of layers on the CPU, D for three of them. An MLP in chunks keeps nothing of its own. For
    a model of 28 layers, D = 1024 and I = 3072 in bfloat16 over float32 weights that is 0.004, and
    0.04 with checkpointing. What PyTorch saves for llama, qwen3, gemma2, gpt2 and qwen3_moe is
    within a third of it (tests/test_activations.py).
    """
    per_token = packed_token_bytes(
        config, bf16=bf16, is_checkpointed=is_checkpointed, has_bf16_stream=has_bf16_stream,
        is_offloaded=is_offloaded, has_chunked_mlps=has_chunked_mlps,
    )  # fmt: skip
    row = 2 * config.get_text_config().hidden_size * head_dtype.itemsize + SCALARS_BYTES
    return row / per_token


def smallest_pass(max_prompt_length: int, max_completion_length: int, row_cost: float) -> int:
    """Tokens of the smallest pass that holds one prompt and completion with its rows at the head.

    row_cost: what the row of a trained token takes, in packed tokens, as `head_row_cost` has it.
    """
    rows = row_cost * max_completion_length
    return math.ceil(max_prompt_length + max_completion_length - 1 + rows)


def packed_token_bytes(
    config: Any, *, bf16: bool, is_checkpointed: bool, has_bf16_stream: bool = False,
    is_offloaded: bool = False, has_chunked_mlps: bool = False,
) -> int:  # fmt: skip
    """Bytes that the layers keep of a packed token on the device, as `head_row_cost` has it."""
    config = config.get_text_config()
    D, L = config.hidden_size, config.num_hidden_layers
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_size = getattr(config, "head_dim", None) or D // num_heads
    A = (num_heads + 2 * num_kv_heads) * head_size
    mlp = 0 if has_chunked_mlps else _mlp_width(config)
    stream = 2 if has_bf16_stream else 4
    layer = stream * 8 * D + (2 if bf16 else 4) * (3 * A + mlp)
    if not is_checkpointed:
        return L * layer
    return (min(L, INPUTS_ON_DEVICE) if is_offloaded else L) * stream * D + layer


def _mlp_width(config: Any) -> int:
    """Elements that an MLP keeps of a token, or the experts that the token visits."""
    D, num_experts = config.hidden_size, getattr(config, "num_experts_per_tok", None)
    I = getattr(config, "intermediate_size", None) or 4 * D  # noqa: E741
    if isinstance(I, list):  # one for each layer
        I = sum(I) // len(I)  # noqa: E741
    if not num_experts:
        return 4 * I
    return num_experts * (4 * getattr(config, "moe_intermediate_size", I) + 2 * D)
