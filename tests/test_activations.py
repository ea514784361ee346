"""The estimate of what a packed token and a row at the head keep, against what PyTorch saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig

from fastrl.activations import SCALARS_BYTES, head_row_cost, packed_token_bytes
from fastrl.packing import pack_tree
from fastrl.policy import Policy
from fastrl_kernels import policy_loss
from fastrl_kernels.objectives import Objective, clipped_ratio
from tests.helpers import random_ids, tiny_policy

MODELS = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "n_embd": 32, "n_head": 4,
             "n_layer": 2, "intermediate_size": 128},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}  # fmt: skip


def saved_bytes(policy: Policy, num_tokens: int) -> int:
    """Bytes that a forward pass keeps for backward, weights apart, each storage once."""
    weights = {x.untyped_storage().data_ptr() for x in policy.model.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, or a freed address could come again

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    plan = pack_tree(random_ids([num_tokens + 1]))  # all trained: no layer can leave any out
    assert len(plan.input_ids) == num_tokens
    with saved_tensors_hooks(keep, lambda x: x):
        policy.hidden_states(plan)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("bf16", [False, True])
def test_bytes_of_a_packed_token(model_type, bf16):
    policy = tiny_policy(model_type=model_type, **MODELS[model_type])
    policy.bf16 = bf16
    measured = (saved_bytes(policy, 112) - saved_bytes(policy, 48)) / 64
    estimated = packed_token_bytes(policy.model.config, bf16=bf16, is_checkpointed=False)
    assert 0.66 < estimated / measured < 1.5


@pytest.mark.parametrize("model_type", MODELS)
def test_bytes_of_a_packed_token_under_weights_of_bf16(model_type):
    policy = tiny_policy(model_type=model_type, **MODELS[model_type])
    policy.model.to(torch.bfloat16)
    measured = (saved_bytes(policy, 112) - saved_bytes(policy, 48)) / 64
    estimated = packed_token_bytes(
        policy.model.config, bf16=policy.is_half, is_checkpointed=False,
        has_bf16_stream=policy.has_bf16_stream,
    )  # fmt: skip
    assert 0.66 < estimated / measured < 1.5


def test_cost_of_a_row_at_the_head():
    """By hand for a tiny qwen3: D = 32, A = 64, I = 48, two layers."""
    policy = tiny_policy()
    config = policy.model.config
    head, layer = 2 * 4 * 32 + 64, 4 * (8 * 32 + 3 * 64 + 4 * 48)
    assert head_row_cost(config, bf16=False, is_checkpointed=False) == head / (2 * layer)
    half = 4 * 8 * 32 + 2 * (3 * 64 + 4 * 48)
    assert head_row_cost(config, bf16=True, is_checkpointed=False) == head / (2 * half)
    inputs = 2 * 4 * 32
    assert head_row_cost(config, bf16=False, is_checkpointed=True) == head / (inputs + layer)
    # Between the layers it keeps their inputs, and twice D for the last norm.
    checkpoint = getattr(policy.model, "activation_checkpointing_enable", None)
    (checkpoint or policy.model.gradient_checkpointing_enable)({"use_reentrant": False})
    measured = (saved_bytes(policy, 112) - saved_bytes(policy, 48)) / 64
    assert inputs <= measured <= inputs + 2 * 4 * 32 + 16


def test_the_documented_example():
    """A model of 0.6B parameters in bfloat16: 0.4% of a packed token, 4% with checkpointing."""
    config = AutoConfig.for_model(
        "qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    costs = [head_row_cost(config, bf16=True, is_checkpointed=x) for x in (False, True)]
    assert [round(cost, 3) for cost in costs] == [0.004, 0.042]


def test_a_width_for_each_layer():
    """The mean of what gemma3n has as a list counts."""
    widths = {"num_hidden_layers": 4, "intermediate_size": [1024, 2048, 1024, 2048]}
    listed = AutoConfig.for_model("gemma3n_text", **widths)
    assert isinstance(listed.intermediate_size, list)
    alike = AutoConfig.for_model("gemma3n_text", **{**widths, "intermediate_size": [1536] * 4})
    costs = [head_row_cost(x, bf16=True, is_checkpointed=False) for x in (listed, alike)]
    assert costs[0] == costs[1] > 0


def test_bytes_of_a_row_at_the_head():
    """What the loss keeps: the same for any vocabulary, so no logits."""
    per_row = []
    for vocab_size in (300, 3000):
        head = torch.zeros(vocab_size, 256, requires_grad=True)

        def kept(num_rows: int, head: Tensor = head) -> int:
            hidden = torch.zeros(num_rows // 2, 256, requires_grad=True)
            given = torch.full((3, num_rows), 0.5).unbind(0)
            weights = head.untyped_storage().data_ptr(), hidden.untyped_storage().data_ptr()
            found: dict[int, Tensor] = {}

            def keep(x: Tensor) -> Tensor:
                if x.untyped_storage().data_ptr() not in weights and x.shape[:1] == (num_rows,):
                    found[x.untyped_storage().data_ptr()] = x
                return x

            with saved_tensors_hooks(keep, lambda x: x):
                rows = hidden[torch.arange(num_rows) // 2]
                out = policy_loss(
                    rows, head, torch.arange(num_rows), *given[:2], old_logps=given[2],
                    objective=Objective(clipped_ratio, (0.2, 0.2)),
                )  # fmt: skip
            found[rows.untyped_storage().data_ptr()] = rows
            for x in out[1:]:
                found[x.untyped_storage().data_ptr()] = x
            return sum(x.nbytes for x in found.values())

        per_row.append((kept(200) - kept(100)) / 100)
    assert per_row[0] == per_row[1]
    assert 0.66 < per_row[0] / (8 * 256 + SCALARS_BYTES) < 1.5
