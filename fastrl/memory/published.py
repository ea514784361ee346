"""Published numbers that the table of sizes needs: models, and what others say that fits.

The models' numbers are those of their config.json on Hugging Face (Qwen/Qwen3-0.6B, -1.7B, -4B,
-8B) and in the Qwen3 technical report (arXiv:2505.09388, table 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Qwen3-1.7B": {
        **_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Qwen3-4B": {
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "Qwen3-8B": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip

UNSLOTH_DOCS = "https://unsloth.ai/docs"
RL_GUIDE = f"{UNSLOTH_DOCS}/get-started/reinforcement-learning-rl-guide"
BENCHMARKS = f"{UNSLOTH_DOCS}/basics/unsloth-benchmarks"
TRL_NOTEBOOK = (
    "https://github.com/huggingface/trl/blob/main/examples/notebooks/grpo_trl_lora_qlora.ipynb"
)


class Claim(NamedTuple):
    """Tokens of context that fit, by nominal size of the card in GB, as its publisher has it."""

    who: str
    what: str
    contexts: dict[int, str]
    source: str


CONTEXTS = (
    Claim("Unsloth, GRPO", "Qwen3-8B, 4 bits, with vLLM; G not stated", {80: "110,000"},
          f"{RL_GUIDE}/grpo-long-context"),
    Claim("Unsloth, GRPO", "Qwen3-VL-8B, 4 bits; G not stated", {24: "32,000"},
          f"{RL_GUIDE}/grpo-long-context"),
    Claim("Unsloth, GRPO", "Llama 3.1 8B, 4 bits, with vLLM; G and card not stated, an H100 "
          "in the sentence before", {80: "47,500"},
          f"{RL_GUIDE}/memory-efficient-rl"),
    Claim("Unsloth, supervised", "Llama 3.1 8B, 4 bits, r = 32, one sequence",
          {8: "2,972", 12: "21,848", 16: "40,724", 24: "78,475", 48: "191,728", 80: "342,733"},
          BENCHMARKS),
    Claim("transformers with FlashAttention 2, supervised, by Unsloth",
          "the same", {8: "none", 12: "932", 16: "2,551", 24: "5,789", 48: "15,502",
                       80: "28,454"}, BENCHMARKS),
)  # fmt: skip


class Figure(NamedTuple):
    """Memory of one setting, as its publisher has it."""

    who: str
    what: str
    memory: str
    source: str


FIGURES = (
    Figure("TRL, GRPO", "Qwen2-7B, 4 bits, r = 32, G = 8, completions of 256, recomputing, "
           "8-bit paged AdamW, Liger", "9.2 GB on a T4, 9.6 GB on an A100", TRL_NOTEBOOK),
    Figure("TRL, GRPO", "the same in full, nothing of that", "62 GB on an A100", TRL_NOTEBOOK),
    Figure("TRL with FlashAttention 2, GRPO, by Unsloth",
           "Llama 3.1 8B, G = 8, context of 20,000", "510.8 GB",
           "https://unsloth.ai/blog/grpo"),
    Figure("Unsloth, GRPO", "the same", "54.3 GB", "https://unsloth.ai/blog/grpo"),
    Figure("Unsloth, GRPO", "Qwen2.5-1.5B, adapter; context not stated", "5 GB",
           "https://unsloth.ai/blog/grpo"),
    Figure("Unsloth, least for any fine-tuning", "8B: 4 bits, 16 bits with an adapter",
           "6 GB, 22 GB",
           f"{UNSLOTH_DOCS}/get-started/fine-tuning-for-beginners/unsloth-requirements"),
)  # fmt: skip
