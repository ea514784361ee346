"""Layers that mix tokens without attention: a packed forest gives what each path alone gives.

Truth is the stock model, one forward per path from the root, in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from fastrl.packing import Plan, pack_segments
from tests.helpers import random_ids, tiny_model
from tests.test_families import (
    MOE,
    assert_plan_gives,
    float64_throughout,
    loss_and_gradients,
    packed_logits,
)

__all__ = ["float64_throughout"]  # runs in every test of this file

ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 6, "linear_conv_kernel_dim": 4,
}  # fmt: skip
EXPERTS = {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 16}
SHORT_CONV = {"layer_types": ["conv", "full_attention", "conv"]}
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {**SHORT_CONV, "conv_L_cache": 3, "conv_bias": True},
    "lfm2_moe": {**SHORT_CONV, **MOE, "num_experts": 4, "num_dense_layers": 1},
    "lfm3": {**SHORT_CONV, "conv_L_cache": 3},
    "olmo_hybrid": {**DELTA, "linear_value_head_dim": 12},
    "qwen3_5_moe_text": {**DELTA, **EXPERTS},
    "qwen3_5_text": DELTA,
    "qwen3_next": {**DELTA, **EXPERTS, "mlp_only_layers": [0]},
}
FORESTS: dict[str, tuple[list[int], list[int]]] = {
    "a group": ([7, 6, 0, 11, 1], [-1, 0, 0, 0, 0]),
    "prompts shorter than the kernel, in one row": (
        [2, 5, 0, 1, 4, 1, 3, 2, 6],
        [-1, 0, 0, 0, -1, 4, 4, -1, -1],
    ),
    "a tree with empty and short segments": (
        [2, 1, 0, 3, 1, 5, 0, 0, 4, 1, 2, 3],
        [-1, 0, 1, 2, 2, 1, 0, 6, 7, 7, 9, 9],
    ),
    "beyond a chunk of the delta rule": ([70, 65, 3, 130], [-1, 0, 0, 0]),
}


def hybrid(model_type: str, num_layers: int = 3) -> Any:
    """A tiny model whose attention is the plainest that transformers has; the second layer's."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    fields = {**HYBRIDS[model_type], "num_hidden_layers": num_layers}
    fields["layer_types"] = fields["layer_types"][:num_layers]
    model = tiny_model(model_type, max_position_embeddings=256, **fields)
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # rows do not depend on how many there are
    return model.train()


def plan_of(forest: str, seed: int = 0) -> tuple[Plan, list[Tensor]]:
    """The plan, and the path of each segment from its root."""
    lengths, parents = FORESTS[forest]
    segments = random_ids(lengths, seed=seed)
    paths: list[Tensor] = []
    for segment, parent in zip(segments, parents, strict=True):
        paths.append(segment if parent < 0 else torch.cat([paths[parent], segment]))
    return pack_segments(segments, parents), paths


def separate_logits(model: Any, plan: Plan, paths: list[Tensor]) -> Tensor:
    """(S, V) logits of the trained tokens, one forward per path."""
    logits = []
    for path, num_trained in zip(paths, plan.completion_lengths, strict=True):
        if num_trained:
            of_path = model(input_ids=path[None].to(model.device), use_cache=False).logits[0]
            logits.append(of_path[-num_trained - 1 : -1])
    return torch.cat(logits)


def assert_packing_changes_nothing(
    model: Any, forest: str, *, source_rows_only: bool = False
) -> None:
    """Plain and with checkpointed layers."""
    plan, paths = plan_of(forest)
    expected = separate_logits(model, plan, paths)
    variants = [(source_rows_only, checkpointing) for checkpointing in (False, True)]
    assert_plan_gives(model, plan, expected, variants)


@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("model_type", sorted(HYBRIDS))
def test_logits_loss_and_every_gradient(model_type, forest):
    assert_packing_changes_nothing(hybrid(model_type), forest)


@pytest.mark.parametrize("num_layers", [2, 3])
@pytest.mark.parametrize("model_type", sorted(HYBRIDS))
def test_a_last_layer_on_the_rows_of_trained_tokens(model_type, num_layers):
    """Where it attends; the others need every row."""
    model = hybrid(model_type, num_layers)
    assert_packing_changes_nothing(model, "a group", source_rows_only=True)


@pytest.mark.parametrize("model_type", sorted(HYBRIDS))
def test_adapters(model_type):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(hybrid(model_type), config).double().train()
    assert_packing_changes_nothing(model, "a tree with empty and short segments")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    # In bfloat16 routers choose other experts at any change of order.
    [(model_type, torch.float32) for model_type in sorted(HYBRIDS)]
    + [(model_type, torch.bfloat16) for model_type in ("lfm2", "olmo_hybrid", "qwen3_5_text")],
)
def test_no_more_error_than_one_row_per_path(model_type, dtype, device, monkeypatch):
    """Values twice as much at most, gradients three times; both against one row in float64."""
    model, (plan, paths) = hybrid(model_type), plan_of("a tree with empty and short segments")

    def numbers(logits: Tensor) -> list[Tensor]:
        targets = plan.target_ids.to(logits.device)
        _, of_parameters = loss_and_gradients(model, logits, targets)
        return [x.cpu() for x in (logits.detach(), *of_parameters.values())]

    truth = numbers(separate_logits(model, plan, paths))
    monkeypatch.undo()
    model.to(device, dtype)
    errors = []
    packed = packed_logits(model, plan.to(torch.device(device)))
    for logits in (separate_logits(model, plan, paths), packed):
        pairs = zip(numbers(logits), truth, strict=True)
        errors.append(torch.stack([(x - true).norm() / true.norm() for x, true in pairs]))
    of_rows, of_packed = errors
    assert of_packed[0] <= 2 * of_rows[0]
    assert of_packed[1:].norm() <= 3 * of_rows[1:].norm()
