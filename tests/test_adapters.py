"""Adapters and weights of 4 bits: saved to the bit, merged in one rounding, refused clearly."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrl.adapters import adapter_in_use, adapter_parameters, is_untouched, with_adapter
from fastrl.config import ModelConfig
from fastrl.errors import InputError
from fastrl.merging import merged_weights, save_merged
from fastrl.packing import pack
from fastrl.policy import Policy, load_policy, new_policy
from fastrl.rollout import Sampling, make_engine
from fastrl.types import Example, Prompts
from fastrl_kernels import linear_logps
from tests.helpers import TEXTS, TINY, random_ids, tiny_policy

pytest.importorskip("peft")
WIDE = {"model_type": "qwen3", "vocab_size": 300, **TINY, "hidden_size": 64,
        "intermediate_size": 128, "head_dim": 16}  # fmt: skip
EVERYTHING = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head", "down_proj"],
              "modules_to_save": ["up_proj"]}  # fmt: skip


def config_of(precision="float32", *, lora=None, **fields):
    fields = {"architecture": WIDE, **fields}
    return ModelConfig(precision=precision, lora={"r": 4} if lora is None else lora, **fields)


def trained(policy: Policy) -> Policy:
    """The policy after its adapter has moved."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) / 10
                parameter.add_(noise.to(parameter.dtype))
    return policy


@torch.no_grad()
def logps_of(policy: Policy) -> torch.Tensor:
    """Of a few completions, through a plan."""
    groups = [random_ids([4, 2], seed=1), random_ids([6, 1], seed=2)]
    plan = pack(random_ids([5, 3]), groups).to(policy.device)
    hidden = policy.hidden_states(plan)[plan.source_index]
    return linear_logps(hidden, policy.lm_head, plan.target_ids).logps


def tensors_of(policy: Policy) -> dict[str, torch.Tensor]:
    return dict(policy.model.state_dict())


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("precision", ["float32", "autocast", "split"])
@pytest.mark.parametrize("lora", [{"r": 4}, EVERYTHING])
def test_a_checkpoint_of_the_adapter_restores_every_bit(tmp_path, precision, load_in_4bit, lora):
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    config = config_of(precision, lora=lora, load_in_4bit=load_in_4bit)
    policy = trained(new_policy(config, TEXTS, seed=3))
    policy.save_base(tmp_path)
    policy.save(tmp_path / "checkpoint-1")
    restored = load_policy(config, tmp_path / "checkpoint-1", seed=99)
    saved, loaded = tensors_of(policy), tensors_of(restored)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert torch.equal(logps_of(policy), logps_of(restored))
    assert not (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    restored.save(tmp_path / "checkpoint-2")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (tmp_path / f"checkpoint-{n}" / name for n in (1, 2))
        assert first.read_bytes() == second.read_bytes()


def test_a_checkpoint_above_a_directory_keeps_no_base(tmp_path):
    tiny_policy().save(tmp_path / "model")
    config = config_of(path=str(tmp_path / "model"), architecture={})
    policy = trained(load_policy(config, config.path, seed=5))
    policy.save_base(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    policy.save(tmp_path / "run" / "checkpoint-4")
    restored = load_policy(config, tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logps_of(policy), logps_of(restored))


def test_peft_itself_loads_a_saved_adapter(tmp_path):
    import peft

    tiny_policy().save(tmp_path / "model")
    config = config_of(path=str(tmp_path / "model"), architecture={})
    policy = trained(load_policy(config, config.path))
    policy.save(tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = random_ids([9])[0][None]
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_a_fresh_adapter_is_a_function_of_the_seed_and_leaves_random_streams_alone():
    state = torch.random.get_rng_state()
    first, same, other = (new_policy(config_of(), TEXTS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    values = [list(adapter_parameters(policy.model).values()) for policy in (first, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(values[0], values[1], strict=True))
    assert not torch.equal(values[0][0], values[2][0])
    assert is_untouched(first.model)
    assert not is_untouched(trained(first).model)


@pytest.mark.parametrize("precision", ["float32", "autocast", "split"])
def test_only_the_adapter_gets_a_gradient(precision):
    policy = trained(new_policy(config_of(precision, lora=EVERYTHING), TEXTS, seed=0))
    plan = pack(random_ids([5]), [random_ids([4, 3], seed=1)])
    rows = policy.hidden_states(plan)[plan.source_index]
    linear_logps(rows, policy.lm_head, plan.target_ids).logps.sum().backward()
    own = adapter_parameters(policy.model)
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is not None) == (name in own), name
        assert parameter.requires_grad == (name in own), name
    trained_in = torch.bfloat16 if precision == "split" else torch.float32
    frozen_in = torch.float32 if precision == "float32" else torch.bfloat16
    assert {x.dtype for x in own.values()} == {trained_in}
    others = (x for name, x in policy.model.named_parameters() if name not in own)
    assert {x.dtype for x in others} == {frozen_in}


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_recomputed_layers_give_the_adapter_the_same_gradient(load_in_4bit):
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    gradients = []
    for checkpointing in (False, True):
        config = config_of(load_in_4bit=load_in_4bit, gradient_checkpointing=checkpointing)
        policy = trained(new_policy(config, TEXTS, seed=0))
        plan = pack(random_ids([5, 2]), [random_ids([4, 3], seed=1), random_ids([6, 1], seed=2)])
        policy.hidden_states(plan).square().mean().backward()
        gradients.append([x.grad for x in adapter_parameters(policy.model).values()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
        assert plain.any()


@pytest.mark.parametrize("lora", [{"r": 4}, EVERYTHING])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_the_engine_samples_from_the_adapted_policy(lora, load_in_4bit):
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    policy = trained(new_policy(config_of(lora=lora, load_in_4bit=load_in_4bit), TEXTS, seed=0))
    ids = random_ids([6, 3])
    prompts = Prompts(tuple(ids), tuple(Example(prompt="x") for _ in ids))
    engine = make_engine("native", policy)
    rollouts = engine.generate(prompts, Sampling(3, 7), torch.Generator().manual_seed(0))
    plan = pack(ids, [rollouts.completion_ids[:3], rollouts.completion_ids[3:]])
    with torch.no_grad():
        rows = policy.hidden_states(plan)[plan.source_index]
        logps = linear_logps(rows, policy.lm_head, plan.target_ids).logps
    for ours, theirs in zip(plan.scatter(logps), rollouts.rollout_logps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_bytes_of_weights_of_4_bits():
    """NF4 with factors of 8 bits is 0.5 + 1/64 + 4/64/256 bytes a value."""
    pytest.importorskip("bitsandbytes")
    architecture = {**WIDE, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    config = config_of("autocast", architecture=architecture, load_in_4bit=True)
    policy = new_policy(config, TEXTS, seed=0)
    num_bytes = num_values = 0
    for parameter in policy.model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            num_values += state.shape.numel()
            num_bytes += parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert num_values == 2 * (3 * 256 * 512 + 2 * 256 * 256 + 2 * 256 * 128)
    assert num_bytes / num_values == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=2e-3)
    dense = new_policy(config_of("autocast", architecture=architecture), TEXTS, seed=0)
    assert policy.num_parameters == dense.num_parameters


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_a_merged_weight_is_the_sum_rounded_once(tmp_path, tie, precision):
    architecture = {**WIDE, "tie_word_embeddings": tie}
    config = config_of(precision, lora=EVERYTHING, architecture=architecture)
    policy = trained(new_policy(config, TEXTS, seed=0))
    merged = merged_weights(policy)
    for path, layer in policy.model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            a, b = (
                getattr(layer, half)["default"].weight.double() for half in ("lora_A", "lora_B")
            )
            exact = layer.base_layer.weight.double() + 2 * b @ a  # lora_alpha / r is 2
            found = merged[f"{path}.weight"]
            spacing = torch.finfo(found.dtype).eps * exact.abs() + 1e-7
            assert ((found.double() - exact).abs() <= spacing).all(), path
    save_merged(policy, tmp_path / "merged")
    whole = load_policy(ModelConfig(precision=precision), tmp_path / "merged")
    atol = 2e-6 if precision == "float32" else 2e-2
    torch.testing.assert_close(logps_of(whole), logps_of(policy), rtol=0, atol=atol)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = random_ids([9])[0][None]
    with torch.no_grad():
        logits = theirs.float()(input_ids=ids).logits
        assert torch.equal(logits, whole.model.float()(input_ids=ids).logits)


SHAPES = {
    "gpt2": ({"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "n_embd": 32, "n_head": 4,
              "n_layer": 2}, {"r": 4}),
    "qwen3_moe": ({**TINY, "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 24}, {"r": 4}),
    "gemma2": ({**TINY, "query_pre_attn_scalar": 8}, {"r": 4, "use_rslora": True}),
    "llama": (TINY, {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "qwen3": ({**TINY, "tie_word_embeddings": True}, {"r": 4, "modules_to_save": ["embed_tokens"]}),
}  # fmt: skip


@pytest.mark.parametrize("model_type", SHAPES)
def test_adapters_of_other_layers_are_restored_and_merged(tmp_path, model_type):
    """Transposed weights, experts in one tensor, embeddings, ends that are tied."""
    fields, lora = SHAPES[model_type]
    if model_type == "qwen3_moe":
        fields = {key: value for key, value in fields.items() if key != "head_dim"}
    architecture = {"model_type": model_type, "vocab_size": 300, **fields}
    config = config_of(lora=lora, architecture=architecture)
    policy = new_policy(config, TEXTS, seed=0)
    before = logps_of(policy)
    trained(policy)
    own = adapter_parameters(policy.model)
    wanting = {name for name, x in policy.model.named_parameters() if x.requires_grad}
    assert own.keys() == wanting
    assert (logps_of(policy) - before).abs().max() > 0.1
    policy.save_base(tmp_path)
    policy.save(tmp_path / "checkpoint-1")
    restored = load_policy(config, tmp_path / "checkpoint-1")
    assert torch.equal(logps_of(restored), logps_of(policy))
    save_merged(policy, tmp_path / "merged")
    whole = load_policy(ModelConfig(), tmp_path / "merged")
    torch.testing.assert_close(logps_of(whole), logps_of(policy), rtol=0, atol=5e-6)


def test_merged_weights_of_4_bits_are_those_that_were_trained_with(tmp_path):
    pytest.importorskip("bitsandbytes")
    policy = trained(new_policy(config_of(load_in_4bit=True), TEXTS, seed=0))
    save_merged(policy, tmp_path / "merged")
    whole = load_policy(ModelConfig(), tmp_path / "merged")
    torch.testing.assert_close(logps_of(whole), logps_of(policy), rtol=0, atol=5e-6)


def test_widths_that_bitsandbytes_misreads_on_a_cpu_are_refused():
    pytest.importorskip("bitsandbytes")
    config = config_of(architecture={**WIDE, "intermediate_size": 96}, load_in_4bit=True)
    with pytest.raises(InputError, match="multiple of 64, but down_proj has 96"):
        new_policy(dataclasses.replace(config, device="cpu"), TEXTS, seed=0)


def test_a_second_adapter_on_the_same_weights(tmp_path):
    """As a critic has: its gradient is its own, and the policy is as before."""
    policy = trained(new_policy(config_of(), TEXTS, seed=0))
    before = logps_of(policy)
    model = with_adapter(policy.model, {"r": 2}, seed=0, name="critic")
    assert torch.equal(logps_of(policy), before)
    plan = pack(random_ids([5]), [random_ids([4, 3], seed=1)])
    with adapter_in_use(model, "critic"):
        base = logps_of(policy)
        policy.hidden_states(plan).square().mean().backward()
    assert not torch.equal(base, before)
    assert all(x.grad is None for x in adapter_parameters(model).values())
    assert any(x.grad is not None for x in adapter_parameters(model, "critic").values())
    both = {**adapter_parameters(model), **adapter_parameters(model, "critic")}
    assert all(parameter.requires_grad for parameter in both.values())
    policy.hidden_states(plan).square().mean().backward()
    assert all(x.grad is not None for x in adapter_parameters(model).values())
    policy.save(tmp_path)
    assert b"critic" not in (tmp_path / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_prog"]}, "has 'q_prog', .* did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "nothing_alike"]}, "has 'nothing_alike'"),
        ({"target_modules": "nothing.*"}, "does not fit the model: .*nothing"),
        ({"modules_to_save": ["lm_heat"]}, "modules_to_save has 'lm_heat', .*'lm_head'"),
        ({"rank": 4}, "model.lora.rank cannot be set"),
        ({"lora_alfa": 4}, "did you mean 'lora_alpha'"),
        ({"r": 0}, "does not fit the model: .*`r`"),
        ({"lora_dropout": 0.1}, "lora_dropout must be 0, got 0.1"),
        ({"init_lora_weights": "pissa"}, "must be true or 'gaussian', got 'pissa'"),
    ],
)
def test_bad_adapters(lora, message):
    with pytest.raises(InputError, match=message) as error:
        new_policy(config_of(lora=lora), TEXTS, seed=0)
    assert "\n" not in str(error.value)


def test_bad_combinations(tmp_path, monkeypatch):
    def refused(message, **fields):
        with pytest.raises(InputError, match=message):
            new_policy(ModelConfig(architecture=WIDE, **fields), TEXTS, seed=0)

    refused("set model.lora, for example", load_in_4bit=True)
    refused("the reference shares them", lora={"r": 2}, reference="cpu")
    refused("set model.gradient_checkpointing = true too", activation_offloading=True)
    offloading = {"activation_offloading": True, "gradient_checkpointing": True}
    refused("already on cpu", device="cpu", **offloading)

    policy = new_policy(config_of(), TEXTS, seed=0)
    policy.save_base(tmp_path)
    policy.save(tmp_path / "checkpoint-1")
    with pytest.raises(InputError, match=r"holds an adapter; set model\.lora"):
        load_policy(ModelConfig(), tmp_path / "checkpoint-1")
    with pytest.raises(InputError, match=r"is not that of model\.lora: .* tensors differ"):
        load_policy(config_of(lora={"r": 5}), tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot load the adapter"):
        load_policy(config_of(), tmp_path / "checkpoint-1")

    real = importlib.util.find_spec
    missing = {"peft", "bitsandbytes", "liger_kernel"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else real(name)
    )
    refused(r"needs peft; pip install 'fastrl-llm\[peft\]'", lora={"r": 2})
    refused(r"fastrl-llm\[liger-kernel\]", use_liger_kernel=True)
    missing.remove("peft")
    refused(r"fastrl-llm\[bitsandbytes\]", lora={"r": 2}, load_in_4bit=True)
