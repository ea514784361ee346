"""What attaching a plan refuses, restores and survives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache

from fastrl.errors import InputError
from fastrl.integrations.transformers import check_model
from fastrl.packing import Plan, pack
from tests.helpers import TINY, random_ids, tiny_model


def plan_of(seed: int = 0, lengths: tuple[int, ...] = (4, 6, 2)) -> Plan:
    return pack(random_ids([5], seed=seed), [random_ids(lengths, seed=seed + 1)])


def shape_of_model(model_type: str, **fields: Any) -> Any:
    """A model without weights: what the check reads costs no memory."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    config = AutoConfig.for_model(model_type, vocab_size=61, pad_token_id=0, **fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).train()


HYBRID = {"num_hidden_layers": 4}
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4, "original_max_position_embeddings": 32, "factor": 4.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("falcon_h1", HYBRID, "hybrid|convolution"),
        ("granitemoehybrid", HYBRID, "linear_attention|mamba|convolution"),
        ("mamba", HYBRID, "linear_attention|attention interface|convolution"),
        ("mamba2", HYBRID, "linear_attention|attention interface|convolution"),
        ("jamba", HYBRID, "linear_attention|convolution"),
        ("recurrent_gemma", HYBRID, "linear_attention|attention interface|convolution"),
        ("minimax", HYBRID, "linear_attention"),
        ("kimi_linear", HYBRID, "linear_attention"),
        ("rwkv", HYBRID, "attention interface"),
        ("deepseek_v32", HYBRID, "indexed_attention"),
        ("llama4_text", HYBRID, "chunked_attention"),
        ("llama", {**TINY, "attention_chunk_size": 8}, "chunked attention"),
        ("bart", {"decoder_layers": 1}, "takes no position_ids"),
        ("bloom", {"n_layer": 1}, "attention interface"),
        ("gemma3_text", {**TINY, "use_bidirectional_attention": True}, "both directions"),
        ("llama", {**TINY, "is_causal": False}, "both directions"),
        ("qwen3", {**TINY, "rope_parameters": LONG_ROPE}, "longrope"),
        (
            "llama",
            {**TINY, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
        ("qwen3", {**TINY, "attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("seed_oss", {**TINY, "attention_dropout": 0.0}, "residual_dropout 0.1"),
        ("gpt2", {"n_layer": 1}, "dropout 0.1"),
        ("mixtral", {**TINY, "router_jitter_noise": 0.02}, "jitter_noise 0.02"),
    ],
)
def test_models_that_would_leak_are_refused_with_the_reason(model_type, fields, reason):
    model = shape_of_model(model_type, **fields)
    with pytest.raises(InputError, match=reason) as error:
        check_model(model)
    assert type(model).__name__ in str(error.value)
    assert "\n" not in str(error.value)


def test_dropout_matters_in_training_only():
    model = shape_of_model("seed_oss", **TINY)
    check_model(model.eval())


class GoesItsOwnWay(nn.Module):
    """An attention layer that never calls the interface."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states.cumsum(1), None


class SwallowsKeywords(nn.Module):
    """An attention layer that keeps what it does not know to itself."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        return self.attention(hidden_states, position_embeddings, attention_mask)


class AddsABias(nn.Module):
    """An attention layer that sends a bias of its own to the interface."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, **kwargs):
        return self.attention(hidden_states, **kwargs, position_bias=torch.zeros(4, 1, 1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_never_attends_is_noticed(checkpointing):
    model, plan = tiny_model().train(), plan_of()
    model.model.layers[1].self_attn = GoesItsOwnWay()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="made 1 calls"), plan.attach(model):
        model.model(**plan.inputs).last_hidden_state.sum().backward()
    assert model.config._attn_implementation == "sdpa"


def test_an_unused_block_is_no_error_and_one_without_attention_is():
    model, plan = tiny_model(), plan_of()
    with plan.attach(model):
        pass
    for layer in model.model.layers:
        layer.self_attn = GoesItsOwnWay()
    with pytest.raises(RuntimeError, match="made 0 calls"), plan.attach(model):
        model.model(**plan.inputs)


def test_a_layer_that_swallows_the_keyword_is_noticed():
    model, plan = tiny_model(), plan_of()
    model.model.layers[1].self_attn = SwallowsKeywords(model.model.layers[1].self_attn)
    with pytest.raises(RuntimeError, match="does not pass keyword arguments"), plan.attach(model):
        model.model(**plan.inputs)


def test_a_bias_or_mask_of_a_layer_s_own_is_noticed():
    model, plan = tiny_model(), plan_of()
    model.model.layers[1].self_attn = AddsABias(model.model.layers[1].self_attn)
    with pytest.raises(RuntimeError, match="its own"), plan.attach(model):
        model.model(**plan.inputs)
    if "doge" in CONFIG_MAPPING:
        model = tiny_model("doge").eval()
        with pytest.raises(RuntimeError, match="its own"), plan.attach(model):
            model.model(**plan.inputs)


def test_dropout_that_no_attribute_shows_is_noticed():
    model, plan = tiny_model("olmo2").train(), plan_of()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 1  # no float, so not taken for a probability
    with pytest.raises(RuntimeError, match="dropout"), plan.attach(model):
        model.model(**plan.inputs)


def test_a_window_that_lives_in_a_mask_alone_is_noticed():
    fields = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    model, plan = tiny_model("phimoe", **fields).eval(), plan_of()
    model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match="window of its attention in a mask"), plan.attach(model):
        model.model(**plan.inputs)


def test_what_a_plan_replaces_is_refused():
    model, plan = tiny_model(), plan_of()
    mask = torch.ones_like(plan.inputs["input_ids"])
    for field, value in (("attention_mask", mask), ("past_key_values", DynamicCache())):
        with pytest.raises(InputError, match=f"called with {field}"), plan.attach(model):
            model(**plan.inputs, **{field: value})
    without = {name: value for name, value in plan.inputs.items() if name != "position_ids"}
    with pytest.raises(InputError, match="without position_ids"), plan.attach(model):
        model(**without)


def gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("inside", [True, False])
def test_backward_of_checkpointed_layers_inside_and_after_the_block(inside):
    model, plan = tiny_model("mistral", sliding_window=4).train(), plan_of()
    with plan.attach(model):
        model.model(**plan.inputs).last_hidden_state.square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with plan.attach(model):
        loss = model.model(**plan.inputs).last_hidden_state.square().sum()
        if inside:
            loss.backward()
    if not inside:
        other = plan_of(seed=5)
        with plan.attach(model), torch.no_grad():
            model.model(**other.inputs)
        loss.backward()
    for recomputed, plain in zip(gradients(model), expected, strict=True):
        assert torch.equal(recomputed, plain)


def test_generation_between_blocks_is_as_before():
    model, plan = tiny_model().eval(), plan_of()
    prompt = random_ids([5], seed=3)[0][None]

    def generated() -> torch.Tensor:
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)

    before = generated()
    with plan.attach(model), torch.no_grad():
        model.model(**plan.inputs)
    assert torch.equal(before, generated())
    assert not model.model._forward_pre_hooks


def test_a_compiled_model_gives_the_same_numbers():
    model = tiny_model("llama", num_hidden_layers=1).train()

    def numbers(run: Any, plan: Plan) -> list[torch.Tensor]:
        model.zero_grad()
        with plan.attach(run):
            logits = run(**plan.inputs).logits
        logits.square().sum().backward()
        return [logits.detach(), *gradients(model)]

    plans = [plan_of(), plan_of(seed=2, lengths=(3, 6, 0, 3))]  # another forest of as many tokens
    expected = [numbers(model, plan) for plan in plans]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    for plan, plain in zip(plans, expected, strict=True):
        with torch._dynamo.config.patch(error_on_recompile=plan is plans[1]):
            ours = numbers(compiled, plan)
        for own, same in zip(ours, plain, strict=True):
            torch.testing.assert_close(own, same, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "reason"), [("dropout", "dropout 0.1"), ("prompt", "prompt")])
def test_adapters_that_a_plan_cannot_follow(kind, reason):
    peft = pytest.importorskip("peft")
    if kind == "dropout":
        config = peft.LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.1)
    else:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(tiny_model(), config).train()
    with pytest.raises(InputError, match=reason), plan_of().attach(wrapped):
        pass
