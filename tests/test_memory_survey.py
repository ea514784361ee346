"""Plans of `fastrl.memory.survey` against numbers counted by hand and against real objects."""

import dataclasses
import time

import pytest
import torch
from transformers import AutoConfig

from fastrl.config import Config, CriticConfig, ModelConfig, OptimConfig, RolloutConfig
from fastrl.errors import InputError
from fastrl.memory.model import Fewer
from fastrl.memory.passes import largest_passes
from fastrl.memory.survey import Survey, survey
from fastrl.memory.trained import trained_of
from fastrl.memory.work import method_of
from fastrl.optim import LeanAdamW

D, I, V, L = 64, 128, 320, 2  # noqa: E741
ARCHITECTURE = {
    "model_type": "qwen3", "vocab_size": V, "hidden_size": D, "intermediate_size": I,
    "num_hidden_layers": L, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512,
}  # fmt: skip
LAYER = D * (64 + 2 * 32) + 64 * D + 3 * D * I + 2 * D + 2 * 16  # q, k, v, o, MLP and norms
UNTIED = 2 * V * D + L * LAYER + D
ANGLES = 2 * 8 * 4  # bytes of the buffers of rotary embeddings
LORA = {"r": 4, "target_modules": ["q_proj"]}
ADAPTER = L * 4 * (D + 64)


def config(architecture=ARCHITECTURE, *, optim=None, rollout=None, critic="head", **fields):
    model = {name: fields.pop(name) for name in list(fields) if hasattr(ModelConfig, name)}
    lora = fields.pop("lora", {})
    return Config(
        **{"max_tokens_per_pass": 2048, "prompts_per_step": 4, **fields},
        model=ModelConfig(architecture=dict(architecture), device="cpu", lora=lora, **model),
        rollout=RolloutConfig(
            **{
                "num_generations": 4, "max_prompt_length": 24, "max_completion_length": 20,
                **(rollout or {}),
            }
        ),
        optim=OptimConfig(**(optim or {})),
        critic=CriticConfig(model=critic),
    )  # fmt: skip


def resident(**fields):
    return dict(survey(config(**fields)).resident())


def test_weights_and_moments():
    assert resident() == {"weights": 4 * UNTIED + ANGLES, "optimizer": 8 * UNTIED}


def test_a_tied_head_is_counted_once():
    tied = {**ARCHITECTURE, "tie_word_embeddings": True}
    weights = UNTIED - V * D
    assert resident(architecture=tied) == {
        "weights": 4 * weights + ANGLES, "optimizer": 8 * weights,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "weight", "state"),
    [("float32", 4, 8), ("autocast", 4, 8), ("split", 2, 10), ("stochastic", 2, 8)],
)
def test_precisions(precision, weight, state):
    found = resident(precision=precision)
    assert found["weights"] == weight * UNTIED + ANGLES
    tables = found["optimizer"] - state * UNTIED
    assert tables == 0 if precision != "stochastic" else 0 < tables < 2**20


def test_an_adapter_and_its_references():
    found = resident(lora=LORA, objective={"beta": 0.1})
    base = {"weights": 4 * UNTIED + ANGLES, "adapter": 4 * ADAPTER, "optimizer": 8 * ADAPTER}
    assert found == base  # the reference is the adapter switched off
    moved = dataclasses.replace(
        config(lora=LORA, objective={"beta": 0.1}),
        warm_start=dataclasses.replace(Config().warm_start, steps=1),
    )
    assert survey(moved).resident() == {**base, "reference": 4 * ADAPTER}


def test_references():
    with_kl = {"objective": {"beta": 0.1}}
    assert resident(**with_kl)["reference"] == 4 * UNTIED + ANGLES
    linear = L * (LAYER - 2 * D - 32)  # values of linear layers, the head apart
    rest = 4 * (UNTIED - linear) + ANGLES
    assert resident(reference="8bit", **with_kl)["reference"] == rest + linear + 4 * linear // 64
    assert resident(reference="4bit", **with_kl)["reference"] == (
        rest + linear // 2 + 4 * linear // 64
    )


def test_value_models():
    found = resident(method="ppo")
    assert found["value model"] == 4 * (D + 1)
    assert found["optimizer"] == 8 * (UNTIED + D + 1)
    found = resident(method="ppo", critic="lora", lora=LORA)
    assert found["value model"] == 4 * (D + 1 + ADAPTER)
    assert found["optimizer"] == 8 * (2 * ADAPTER + D + 1)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adamw_offload"])
@pytest.mark.parametrize("precision", ["float32", "split"])
def test_states_are_those_of_a_real_optimizer(optimizer, precision):
    architecture = {**ARCHITECTURE, "num_hidden_layers": 1}
    planned = resident(
        architecture=architecture, precision=precision, optim={"optimizer": optimizer}
    )
    found = survey(config(architecture, precision=precision))
    shapes = [x.shape for x in found.policy().model.parameters()]
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    weights = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    kinds = {"adamw": "float32", "adamw_8bit": "8bit", "adamw_offload": "cpu"}
    real = LeanAdamW(weights, weights=precision, moments=kinds[optimizer])
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    real.step()
    states = [x for state in real.state.values() for x in state.values()]
    total = sum(x.numel() * x.itemsize for x in states if isinstance(x, torch.Tensor))
    tables = 4 * sum({V * D, D * I, 64 * D} if optimizer == "adamw_8bit" else ())
    assert planned["optimizer"] == total + tables


def test_moments_on_the_cpu_are_not_on_a_gpu():
    found = survey(config(optim={"optimizer": "adamw_offload"}), device="cuda").resident()
    assert "optimizer" not in found


def test_weights_of_4_bits():
    half = config(lora=LORA, precision="autocast")
    four = dataclasses.replace(half, model=dataclasses.replace(half.model, load_in_4bit=True))
    # bitsandbytes need not be there to plan with it.
    saved = (
        Survey(half, device="cpu").resident()["weights"]
        - Survey(four, device="cpu").resident()["weights"]
    )
    linear = LAYER - 2 * D - 32
    tables = 7 * 4 * (16 + 256 + 1)
    # 0.5 bytes, a factor of 8 bits for 64 values, and one of float32 for 256 of those.
    nested = 4 * sum(-(-size // (64 * 256)) for size in (D * 64, *3 * (D * 32,), *3 * (D * I,)))
    assert saved == L * (2 * linear - linear // 2 - linear // 64 - nested - tables)


def phases(found, changed=None):
    return {phase.name: phase for phase in found.update_phases(changed or found.config)}


def test_a_second_size_of_passes_is_told_without_running_it():
    base = config(max_tokens_per_pass=300)
    found = survey(base)
    phases(found)
    phases(found, dataclasses.replace(base, max_tokens_per_pass=250))
    for budget in (270, 180, 410):
        changed = dataclasses.replace(base, max_tokens_per_pass=budget)
        assert phases(found, changed) == phases(survey(changed))


def test_many_layers_are_told_from_few():
    many = {**ARCHITECTURE, "num_hidden_layers": 12}
    base = config(many)
    few = survey(base)
    assert few._fewer(base.model) == Fewer(4, 5)
    whole = survey(base)
    whole._found[next(key for key in few._found if key[0] == "fewer")] = Fewer(12, 12)
    assert phases(few) == phases(whole)


def test_passes_are_filled_with_a_part_of_the_next_completion():
    base = config(max_tokens_per_pass=100)
    trained = trained_of(base, method_of(base), is_half=False)
    assert trained.sizes == (4, 4, 4, 4)
    passes = largest_passes(base, trained, 0.0)
    # A prompt with four completions takes 24 + 4 * 19 = 100 tokens.
    assert passes.first.numbers == (100, 77, 80)
    passes = largest_passes(dataclasses.replace(base, max_tokens_per_pass=150), trained, 0.0)
    # Behind another prompt of 24 tokens there is room for four of 7 tokens, of which 6 are encoded.
    assert passes.first.numbers == (148, 77 + 4 * 6 + 1, 80 + 4 * 7)
    assert passes.next == passes.first
    whole = largest_passes(dataclasses.replace(base, max_tokens_per_pass=1000), trained, 0.0)
    assert whole.first.numbers == (400, 4 * 77, 320)
    assert whole.next is None


def test_errors():
    with pytest.raises(InputError, match="at least 45 tokens"):
        phases(survey(config(max_tokens_per_pass=30)))
    with pytest.raises(InputError, match="no model given"):
        survey(Config(model=ModelConfig(device="cpu")))
    with pytest.raises(InputError, match="cpu or cuda"):
        survey(config(), device="tpu")


def test_a_plan_is_quick():
    found = survey(config())
    start = time.process_time()
    phases(found)
    first = time.process_time() - start
    assert first < 1.0


FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": 16}, "qwen2": {}, "phi3": {}, "gemma": {},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_of_models(model_type):
    known = vars(AutoConfig.for_model(model_type))
    names = {**ARCHITECTURE, "n_embd": D, "n_layer": L, "n_head": 4, "n_positions": 512}
    fields = {key: value for key, value in names.items() if key in known}
    architecture = {**fields, **FAMILIES[model_type], "model_type": model_type}
    found = survey(config(architecture))
    by_name = phases(found)
    weights = found.resident()["weights"]
    assert by_name["update"].parts["activations"] > 0
    # All gradients are there when the optimizer begins, or but one where its step takes most.
    sizes = {id(x): 4 * x.numel() for x in found.policy().model.parameters()}
    missing = sum(sizes.values()) - by_name["step"].parts["gradients"]
    assert missing in (0, *sizes.values())
    assert weights - sum(sizes.values()) < 1000  # buffers


def test_a_model_that_cannot_be_planned_is_refused_by_name():
    bloom = {"model_type": "bloom", "hidden_size": D, "n_layer": L, "n_head": 4, "vocab_size": V}
    with pytest.raises(InputError, match="BloomForCausalLM"):
        phases(survey(config(bloom)))

    class Reads(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states):
            assert hidden_states.flatten()[:2].tolist() != [0.0, 0.0]
            return self.inner(hidden_states)

    found = survey(config())
    layer = found.policy(num_layers=L).model.model.layers[1]
    layer.mlp = Reads(layer.mlp)
    with pytest.raises(InputError, match=r"Reads at model\.layers\.1\.mlp"):
        phases(found)


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_checkpointing": True, "activation_offloading": True},
        {"gradient_checkpointing": True, "reference": "cpu", "objective": {"beta": 0.1}},
        {"precision": "split", "optim": {"optimizer": "adamw_offload"}},
    ],
)
def test_what_a_gpu_has_less_of(fields):
    plain = {key: fields[key] for key in ("precision", "objective") if key in fields}
    less = phases(survey(config(**fields), device="cuda"))
    more = phases(survey(config(**plain), device="cuda"))
    assert less["update"].total < more["update"].total


def test_layers_offloaded_keep_their_inputs_elsewhere():
    many = {**ARCHITECTURE, "num_hidden_layers": 18}
    long = {"max_prompt_length": 100, "max_completion_length": 100}
    recomputed = config(many, gradient_checkpointing=True, rollout=long, lora=LORA)
    settings = dataclasses.replace(recomputed.model, activation_offloading=True)
    offloaded = dataclasses.replace(recomputed, model=settings)
    found = survey(recomputed, device="cuda")
    trained = trained_of(recomputed, method_of(recomputed), is_half=False)
    work = largest_passes(recomputed, trained, found.head_row_cost(recomputed)).first
    kept, gone = (
        phases(found, changed)["update"].parts["activations"] for changed in (recomputed, offloaded)
    )
    # Eighteen inputs against three.
    assert kept - gone == pytest.approx(15 * work.num_tokens * D * 4, rel=0.1)
