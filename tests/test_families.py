"""Every family of models: a packed row gives what one forward per sequence gives, to float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from fastrl.packing import Plan, pack
from fastrl_kernels import LMHead, linear_logps
from tests.helpers import random_ids, tiny_model

MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LOCAL = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 4, "layer_types": LOCAL},
    "deepseek_v3": {**MOE, **LATENT, **ROUTED},
    "ernie4_5": {},
    "exaone4": {"sliding_window": 4, "layer_types": LOCAL},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "layer_types": LOCAL, "query_pre_attn_scalar": 8},
    "glm4": {},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_oss": {"sliding_window": 4, "num_local_experts": 4, **MOE},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "hunyuan_v1_dense": {},
    "llama": {},
    "ministral": {"sliding_window": 4, "layer_types": LOCAL},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4, **MOE},
    "olmo2": {},
    "olmo3": {"sliding_window": 4, "layer_types": LOCAL},
    "phi3": {"sliding_window": 4},
    "qwen2": {
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
        "layer_types": LOCAL[::-1],
    },
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, **MOE},
    "seed_oss": {"residual_dropout": 0.0, "attention_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0]},
}  # fmt: skip
PROMPTS = [7, 4]
COMPLETIONS = [[6, 0, 11], [3, 1]]  # ragged groups, an empty completion, longer than any window


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    """Models that compute norms, routers or softmax in float32 compute them in float64 instead."""

    def widened(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {n: torch.float64 if x is torch.float32 else x for n, x in kwargs.items()}
            return function(*args, **kwargs)

        return call

    for owner in (torch, torch.Tensor, nn.functional):
        for name in {"to", "type", "softmax"} & set(dir(owner)):
            monkeypatch.setattr(owner, name, widened(getattr(owner, name)))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def family(model_type: str) -> Any:
    """A tiny model of the family whose own attention is the plainest that transformers has."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    model = tiny_model(model_type, **FAMILIES[model_type])
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        # Grouped products know no float64; rows of these do not depend on how many there are.
        model.set_experts_implementation("batched_mm")
    return model.train()


def tokens(seed: int = 0) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    flat = iter(random_ids([n for group in COMPLETIONS for n in group], seed=seed + 1))
    return random_ids(PROMPTS, seed=seed), [[next(flat) for _ in group] for group in COMPLETIONS]


def separate_logits(model: Any, prompts: list, completions: list) -> torch.Tensor:
    """(S, V) logits of the trained tokens, one forward per sequence."""
    logits = []
    for prompt, group in zip(prompts, completions, strict=True):
        for completion in group:
            row = torch.cat([prompt, completion])[None]
            logits.append(model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1])
    return torch.cat(logits)


def packed_logits(model: Any, plan: Plan, *, source_rows_only: bool = False) -> torch.Tensor:
    with plan.attach(model, source_rows_only=source_rows_only):
        logits = model(**plan.inputs).logits[0]
    return logits[plan.source_index]


def loss_and_gradients(
    model: Any, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that weighs every token differently, and its gradient in every parameter."""
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    weights = torch.arange(1, len(logps) + 1, device=logps.device).double().cos()
    loss = (weights * logps).sum()
    model.zero_grad()
    loss.backward()
    used = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), used


def assert_packing_changes_nothing(model: Any) -> None:
    """Plain, with a last layer on the rows of trained tokens, and with checkpointed layers too."""
    prompts, completions = tokens()
    plan = pack(prompts, completions)
    expected = separate_logits(model, prompts, completions)
    assert_plan_gives(model, plan, expected, ((False, False), (True, False), (True, True)))


def assert_plan_gives(
    model: Any, plan: Plan, expected: torch.Tensor, variants: Sequence[tuple[bool, bool]]
) -> None:
    """The same logits, loss and gradients; variants: (source_rows_only, checkpointing), in turn."""
    loss, gradients = loss_and_gradients(model, expected, plan.target_ids)
    for source_rows_only, checkpointing in variants:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logits = packed_logits(model, plan, source_rows_only=source_rows_only)
        packed_loss, packed = loss_and_gradients(model, logits, plan.target_ids)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(packed_loss, loss, rtol=1e-11, atol=1e-11)
        assert packed.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (packed[name] - gradient).abs().max()
            assert error <= 1e-11 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_logits_loss_and_every_gradient(model_type):
    assert_packing_changes_nothing(family(model_type))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_adapters(model_type):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    assert_packing_changes_nothing(peft.get_peft_model(family(model_type), config).double().train())


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_sibling_cannot_be_seen(model_type):
    """Bitwise, because a small leak hides below any tolerance; and the head reads the family."""
    model = family(model_type).eval()
    prompts, completions = tokens()

    def hidden(group: list[torch.Tensor]) -> tuple[Plan, torch.Tensor]:
        plan = pack(prompts, [group, completions[1]])
        with plan.attach(model), torch.no_grad():
            states = model.base_model(**plan.inputs).last_hidden_state[0]
        return plan, states[plan.source_index]

    plan, states = hidden(completions[0])
    changed = 3 + (completions[0][0] + 7) % 58
    _, other_states = hidden([changed, *completions[0][1:]])
    before, after = plan.scatter(states), plan.scatter(other_states)
    assert not torch.equal(before[0], after[0])
    for own, same in zip(before[1:], after[1:], strict=True):
        assert torch.equal(own, same)

    with torch.no_grad():
        logps = linear_logps(states, LMHead.from_model(model), plan.target_ids).logps
        expected = separate_logits(model, prompts, completions).log_softmax(-1)
    expected = expected.gather(1, plan.target_ids[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-11)
