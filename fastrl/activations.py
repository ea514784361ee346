"""What training keeps in memory for a packed token, and for a trained token's row at the head.

Legend: D hidden, L layers, I width inside an MLP, A widths of queries, keys and values together.
"""

from __future__ import annotations

from typing import Any

SCALARS_BYTES = 64
"""Of a row at the head: ids, advantage, weight, old and new log-probability, entropy, slope."""


def head_row_cost(config: Any, *, bf16: bool, is_checkpointed: bool) -> float:
    """What a trained token's row at the head keeps until backward, in packed tokens of the model.

    config: that of a transformers model.

    A row at the head keeps its hidden state and the gradient of that, 2 D float32, and a few
    scalars; its logits are never stored. A packed token keeps in each layer about 8 D around the
    residual stream and the norms (float32), and 3 A + 4 I in attention and MLP (bfloat16 under
    `bf16`), 4 I + 2 D for each expert that it visits. With gradient checkpointing it keeps D for
    each layer and all of that for one. For a model of 28 layers, D = 1024 and I = 3072 in bfloat16
    that is 0.004, and 0.04 with checkpointing. What PyTorch saves for llama, qwen3, gemma2, gpt2
    and qwen3_moe is within a third of it (tests/test_activations.py).
    """
    per_token = packed_token_bytes(config, bf16=bf16, is_checkpointed=is_checkpointed)
    return (8 * config.get_text_config().hidden_size + SCALARS_BYTES) / per_token


def packed_token_bytes(config: Any, *, bf16: bool, is_checkpointed: bool) -> int:
    """Bytes that the layers keep of one packed token, by the formula of `head_row_cost`."""
    config = config.get_text_config()
    D, L = config.hidden_size, config.num_hidden_layers
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_size = getattr(config, "head_dim", None) or D // num_heads
    A = (num_heads + 2 * num_kv_heads) * head_size
    layer = 4 * 8 * D + (2 if bf16 else 4) * (3 * A + _mlp_width(config))
    return L * 4 * D + layer if is_checkpointed else L * layer


def _mlp_width(config: Any) -> int:
    """Elements that an MLP keeps of a token, or the experts that the token visits."""
    D, num_experts = config.hidden_size, getattr(config, "num_experts_per_tok", None)
    I = getattr(config, "intermediate_size", None) or 4 * D  # noqa: E741
    if isinstance(I, list):  # one for each layer
        I = sum(I) // len(I)  # noqa: E741
    if not num_experts:
        return 4 * I
    return num_experts * (4 * getattr(config, "moe_intermediate_size", I) + 2 * D)
