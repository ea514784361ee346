"""The forward pass with our head beside verl's own fused forward and the model's own logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastrl.errors import InputError
from fastrl.integrations.replaced_forward import restore_forward
from fastrl.integrations.transformers import fuse
from fastrl.integrations.verl import register_fused_head, use_fused_head

pytest.importorskip("verl")
dense = pytest.importorskip("verl.models.transformers.dense_common")
monkey_patch = pytest.importorskip("verl.models.transformers.monkey_patch")

V, B, L = 61, 3, 13
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
    "attn_implementation": "eager",
}  # fmt: skip


class Reference(Qwen3ForCausalLM):
    """A class of its own, whose forward verl may replace."""


def qwen3(*, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied))


def of_verl(model: PreTrainedModel) -> Any:
    """A copy with the forward of verl's own torch backend."""
    other = copy.deepcopy(model)
    other.__class__ = Reference
    monkey_patch.patch_forward_with_backends(
        other, use_fused_kernels=True, fused_kernels_backend="torch"
    )
    return other


def of_ours(model: PreTrainedModel) -> Any:
    """A copy with ours, chosen as a worker of verl does."""
    register_fused_head()
    other = copy.deepcopy(model)
    monkey_patch.patch_forward_with_backends(
        other, use_fused_kernels=True, fused_kernels_backend="fastrl"
    )
    return other


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def packed() -> dict[str, Any]:
    """Three sequences in a row, as verl has them without padding."""
    row = ids(1, 23)
    positions = torch.cat([torch.arange(n) for n in (9, 1, 13)])[None]
    return {
        "input_ids": row, "attention_mask": None, "position_ids": positions, "use_cache": False,
        "return_dict": True, "shift_labels": row.roll(-1, 1),
    }  # fmt: skip


def padded() -> dict[str, Any]:
    """Padding on both sides."""
    mask = torch.ones(B, L, dtype=torch.int64)
    mask[0, :4] = 0
    mask[1, 7:] = 0
    mask[2, :2] = mask[2, 11:] = 0
    return {
        "input_ids": ids(B, L), "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False, "return_dict": True,
    }  # fmt: skip


def answer(model: Any, inputs: dict[str, Any], temperature: Any) -> tuple[Any, dict[str, Tensor]]:
    """The output, and gradients of weighted sums of both tables where there are tokens."""
    model.zero_grad()
    out = model(**inputs, temperature=temperature)
    mask = inputs["attention_mask"]
    weights = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(2))
    if mask is not None:
        weights = weights * mask
    (weights * (out.log_probs + 0.3 * out.entropy)).sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Any, theirs: Any, mask: Tensor | None, tolerance: float = 1e-5) -> None:
    assert type(ours[0]) is type(theirs[0]) is dense.CausalLMOutputForPPO
    where = slice(None) if mask is None else mask.bool()
    for name in ("log_probs", "entropy"):
        one, other = getattr(ours[0], name), getattr(theirs[0], name)
        assert one.shape == other.shape
        assert one.dtype == torch.float32
        assert float((one - other)[where].abs().max().detach()) < tolerance, name
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert float((ours[1][name] - gradient).abs().max()) < tolerance, name
    assert max(float(x.abs().max()) for x in theirs[1].values()) > 0.1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("make", [packed, padded])
def test_verls_own_fused_forward(make, tied):
    model, inputs = qwen3(tied=tied), make()
    ours = answer(of_ours(model), inputs, 0.7)
    assert_same(ours, answer(of_verl(model), inputs, 0.7), inputs["attention_mask"])
    if inputs["attention_mask"] is not None:
        assert torch.equal(ours[0].log_probs == 0, inputs["attention_mask"] == 0)


def test_targets():
    """shift_labels as they are, labels rolled by one; ids of no token are left out."""
    model = of_ours(qwen3())
    inputs = packed()
    inputs["labels"] = ids(1, 23, seed=5)
    shifted = inputs.pop("shift_labels")
    assert_same(
        answer(model, inputs, 1.0),
        answer(of_verl(qwen3()), inputs, 1.0),
        None,
    )
    shifted[0, 3:6] = -100
    out = model(**inputs, shift_labels=shifted, temperature=1.0)
    assert torch.equal((out.log_probs == 0).nonzero()[:, 1], torch.arange(3, 6))


def from_logits(logits: Tensor, inputs: dict[str, Any], temperature: Any) -> tuple[Tensor, Tensor]:
    logps = (logits / temperature).log_softmax(dim=-1)
    targets = inputs["input_ids"].roll(-1, 1)
    return logps.gather(-1, targets[..., None])[..., 0], -(logps.exp() * logps).sum(dim=-1)


@pytest.mark.parametrize("shape", [(), (B,), (B, L)])
def test_temperatures(shape):
    generator = torch.Generator().manual_seed(3)
    temperature = 0.5 + torch.rand(shape, generator=generator)
    model, inputs = of_ours(qwen3()), padded()
    out = model(**inputs, temperature=temperature)
    whole = temperature[:, None] if len(shape) == 1 else temperature
    logits = model(**inputs).logits
    expected = from_logits(logits, inputs, whole.expand(B, L)[..., None])
    mask = inputs["attention_mask"].bool()
    for ours, theirs in zip((out.log_probs, out.entropy), expected, strict=True):
        assert float((ours - theirs)[mask].abs().max()) < 1e-5
    with pytest.raises(InputError, match=r"shape \(\), \(3,\) or \(3, 13\), got \(4,\)"):
        model(**inputs, temperature=torch.ones(4))


def test_softcap_of_the_head():
    """Which verl's own backends leave out."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, final_logit_softcapping=2.0, pad_token_id=0)
    plain, inputs = Gemma2ForCausalLM(config), packed()
    model = of_ours(plain)
    out = model(**inputs, temperature=0.8)
    given = {name: inputs[name] for name in ("input_ids", "position_ids", "use_cache")}
    logps, entropies = from_logits(plain(**given).logits, inputs, 0.8)
    assert float((out.log_probs - logps).abs().max()) < 1e-5
    assert float((out.entropy - entropies).abs().max()) < 1e-5


@pytest.mark.parametrize("part", ["model", "lm_head"])
def test_states_of_one_dtype_and_a_head_of_another(part):
    """Which nn.Linear is given under autocast, where it casts both."""
    model, inputs = of_ours(qwen3()), packed()
    getattr(model, part).bfloat16()
    out = model(**inputs, temperature=0.7)
    given = {name: inputs[name] for name in ("input_ids", "position_ids", "use_cache")}
    states, weight = model.model(**given).last_hidden_state, model.lm_head.weight
    assert states.dtype != weight.dtype
    logits = states.to(weight.dtype).float() @ weight.float().T
    logps, entropies = from_logits(logits, inputs, 0.7)
    assert out.log_probs.dtype == torch.float32
    assert float((out.log_probs - logps).detach().abs().max()) < 1e-5
    assert float((out.entropy - entropies).detach().abs().max()) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**inputs, temperature=0.7)
        logits = model(**given).logits.float()
    logps, _ = from_logits(logits, inputs, 0.7)
    assert float((rounded.log_probs - logps).detach().abs().max()) < 0.1


def test_adapters_on_layers_and_head():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "lm_head"], lora_alpha=8, init_lora_weights=False
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(of_ours(qwen3()), config)
    inputs = packed()
    out, gradients = answer(model, inputs, 0.7)
    model.zero_grad()
    given = {name: inputs[name] for name in ("input_ids", "position_ids", "use_cache")}
    logits = model(**given).logits
    logps, entropies = from_logits(logits, inputs, 0.7)
    assert float((out.log_probs - logps).abs().max()) < 1e-5
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(2))
    (weights * (logps + 0.3 * entropies)).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = max(1.0, float(parameter.grad.abs().max()))
            assert float((gradients[name] - parameter.grad).abs().max()) < 1e-5 * size, name
    assert any("lm_head.lora_B" in name for name in gradients)


def test_other_calls_are_the_models_own():
    plain = qwen3()
    model = of_ours(plain)
    row = ids(2, 7)
    assert torch.equal(model(input_ids=row).logits, plain(input_ids=row).logits)
    assert torch.equal(model(row, labels=row).loss, plain(row, labels=row).loss)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(row, **settings), plain.generate(row, **settings))
    assert "forward" not in model.lm_head.__dict__
    with pytest.raises(InputError, match="shift_labels are for a fused forward pass"):
        model(input_ids=row, shift_labels=row)
    restore_forward(model)
    assert "forward" not in model.__dict__
    assert torch.equal(model(input_ids=row).logits, plain(input_ids=row).logits)


def test_the_layers_forward_comes_back_after_an_error():
    model, inputs = of_ours(qwen3()), packed()
    with pytest.raises(ValueError, match="temperature must be positive"):
        model(**inputs, temperature=0.0)
    assert "forward" not in model.lm_head.__dict__


def test_verls_own_backends_stay(capsys):
    model = qwen3()
    register_fused_head()
    register_fused_head()
    monkey_patch.patch_forward_with_backends(model, fused_kernels_backend="fastrl")
    assert "forward" not in model.__dict__
    assert "Skipping monkey patch" in capsys.readouterr().out
    assert type(of_verl(model)).forward is dense.forward_with_torch_backend
    chooser = monkey_patch.patch_forward_with_backends
    assert not isinstance(chooser.original, type(chooser))


BAD_CALLS = {
    "has no logits_to_keep": {"logits_to_keep": 2},
    "has no inputs_embeds": {"inputs_embeds": torch.zeros(1, 2, 32)},
    "needs return_dict=True": {"return_dict": False},
    "needs input_ids": {"input_ids": None},
    r"the shape of input_ids, \(1, 23\), got \(1, 22\)": {"shift_labels": ids(1, 22)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls(message):
    with pytest.raises(InputError, match=message):
        of_ours(qwen3())(**{**packed(), **BAD_CALLS[message]}, temperature=1.0)
    with pytest.raises(InputError, match="by name"):
        of_ours(qwen3())(ids(1, 4), temperature=1.0)


def test_models_that_cannot_use_it():
    once = of_ours(qwen3())
    with pytest.raises(InputError, match="already replaced"):
        use_fused_head(once)
    with pytest.raises(InputError, match="already replaced"):
        use_fused_head(fuse(qwen3()))
    with pytest.raises(InputError, match="before FSDP or DistributedDataParallel wraps"):
        use_fused_head(nn.Linear(2, 2))
    text = {name: value for name, value in SIZES.items() if name != "attn_implementation"}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        "projection_dim": 32,
    }  # fmt: skip
    images = LlavaForConditionalGeneration(
        LlavaConfig(text_config={**text, "model_type": "llama"}, vision_config=vision)
    )
    with pytest.raises(InputError, match=r"impl_backend=torch, verl's own"):
        use_fused_head(images)
    torch.manual_seed(0)
    wrapped = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=2))
    wrapped.lm_head = nn.Sequential(wrapped.lm_head)
    with pytest.raises(InputError, match="GPT2LMHeadModel cannot use the fused head"):
        use_fused_head(wrapped)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """bf16 and a vocabulary of several chunks, beside float32 logits of the same states."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 50_257, "hidden_size": 512, "initializer_range": 0.02}
    config = Qwen3Config(**sizes, tie_word_embeddings=False)
    model = of_ours(Qwen3ForCausalLM(config).cuda().bfloat16())
    row = torch.randint(0, 50_257, (1, 2049), device="cuda")
    inputs = {"input_ids": row, "position_ids": torch.arange(2049, device="cuda")[None]}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = model(**inputs, temperature=0.8)
    (out.log_probs.mean() + 0.1 * out.entropy.mean()).backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30
    states = model.model(**inputs).last_hidden_state.float()
    logits = states @ model.lm_head.weight.float().T
    logps, entropies = from_logits(logits, inputs, 0.8)
    assert float((out.log_probs - logps).abs().max()) < 1e-3
    assert float((out.entropy - entropies).abs().max()) < 1e-3
