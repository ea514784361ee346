"""LMHead.from_model on tiny random models: the same logits as the model's own forward."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastrl_kernels import LMHead, linear_logps

SIZES = {
    "vocab_size": 83,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
RECURRENT = {"lru_width": 24, "block_types": ["attention"], "logits_soft_cap": 0.7}
MODELS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Llama", UNTIED, {}),
    ("Llama", TIED, {}),
    ("Mistral", UNTIED, {}),
    ("Qwen2", TIED, {}),
    ("Qwen3", TIED, {}),
    ("Gemma2", {"final_logit_softcapping": 0.7}, {"softcap": 0.7}),
    ("Gemma3", TIED, {}),
    ("Gemma3", {"final_logit_softcapping": 0.7}, {"softcap": 0.7}),
    ("RecurrentGemma", RECURRENT, {"softcap": 0.7}),
    ("Cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
    ("Cohere2", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
    ("Granite", {"logits_scaling": 8.0}, {"logit_scale": 0.125}),
    ("HyperCLOVAX", {"logits_scaling": 8.0}, {"logit_scale": 8.0}),
    ("Phi", {"num_key_value_heads": 2}, {}),
    ("Phi3", UNTIED, {}),
    ("Olmo", UNTIED, {}),
    ("Olmo2", UNTIED, {}),
    ("Olmo3", UNTIED, {}),
]


def make_model(family: str, options: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)  # transformers initialises from the global generator
    architecture = getattr(transformers, f"{family}ForCausalLM")
    model = architecture(architecture.config_class(**SIZES | options)).to(dtype).eval()
    return scramble(model)


def scramble(model: nn.Module) -> nn.Module:
    """Logits far from uniform, so that a wrong scale shows; biases and adapters away from zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            is_zero = bool((parameter == 0).all())
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(noise if is_zero else 4 * parameter)
    return model


def next_token_logps(model: nn.Module, head: LMHead) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a random row: by linear_logps, and from the model's logits."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 83, (1, 17), generator=generator)
    hidden = model.model(input_ids=input_ids).last_hidden_state[0, :-1]  # type: ignore[operator,union-attr]
    logits = model(input_ids=input_ids).logits[0, :-1]
    target_ids = input_ids[0, 1:]
    ours = linear_logps(hidden, head, target_ids).logps
    return ours, logits.log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]


@pytest.mark.parametrize(("family", "options", "fields"), MODELS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logps_are_those_of_the_models_own_logits(
    family: str,
    options: dict[str, Any],
    fields: dict[str, Any],
    dtype: torch.dtype,
    atol: float,
) -> None:
    model = make_model(family, options, dtype)
    head = LMHead.from_model(model)
    assert head.weight is model.get_output_embeddings().weight  # type: ignore[operator]
    assert (head.vocab_size, head.bias is None) == (None, family != "Phi")
    for name, value in fields.items():
        assert getattr(head, name) == value
    ours, expected = next_token_logps(model, head)
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    if fields or head.bias is not None:
        ours, expected = next_token_logps(model, LMHead(head.weight))
        assert (ours - expected).abs().max() > 1e-3


def make_multimodal(family: str, text: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 14}
    vision |= {"num_attention_heads": 1, "patch_size": 14, "projection_dim": 24}
    architecture = getattr(transformers, f"{family}ForConditionalGeneration")
    config = architecture.config_class(text_config=SIZES | text, vision_config=vision)
    return scramble(architecture(config).double().eval())


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("Gemma3", {"final_logit_softcapping": None}),
        ("PaliGemma", {"model_type": "gemma2", "final_logit_softcapping": 0.7}),
        ("Llava", {"model_type": "llama"}),
    ],
)
def test_text_model_of_a_multimodal_one(family: str, text: dict[str, Any]) -> None:
    model = make_multimodal(family, text)
    head = LMHead.from_model(model)
    assert head.softcap == text.get("final_logit_softcapping")
    ours, expected = next_token_logps(model, head)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("Gemma3", {"final_logit_softcapping": 0.7}),
        ("Llava", {"model_type": "cohere", "logit_scale": 0.25}),
    ],
)
def test_multimodal_model_that_ignores_its_text_configuration(
    family: str, text: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="multimodal"):
        LMHead.from_model(make_multimodal(family, text))


def test_padded_rows_beyond_the_configured_vocabulary() -> None:
    model = make_model("Llama", {"tie_word_embeddings": False}, torch.float64)
    expected, _ = next_token_logps(model, LMHead.from_model(model))
    weight = model.lm_head.weight  # type: ignore[union-attr]
    model.lm_head.weight = nn.Parameter(torch.cat([weight, 9 * weight[:5]]))  # type: ignore[union-attr]
    head = LMHead.from_model(model)
    assert head.vocab_size == 83
    ours, _ = next_token_logps(model, head)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


class FakeModel:
    """As much of a model as from_model looks at."""

    def __init__(self, output_layer: Any, **config: Any) -> None:
        self.output_layer = output_layer
        self.config = SimpleNamespace(vocab_size=11, **config)

    def get_output_embeddings(self) -> Any:
        return self.output_layer


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, 0.5),
        ({"model_type": "muse_glimmer_text", "output_multiplier": 0.2}, 0.2),
        ({"model_type": "inkling_text", "logits_mup_width_multiplier": 4.0}, 0.25),
        ({"model_type": "minicpm3", "logits_scaling": 2.0}, 0.5),
        ({"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"}, 1.0),
        ({"model_type": "cohere", "logit_scale": None}, 1.0),
        ({}, 1.0),
    ],
)
def test_scale_of_the_logits(config: dict[str, Any], scale: float) -> None:
    head = LMHead.from_model(FakeModel(nn.Linear(5, 11), **config))
    assert head.logit_scale == scale
    assert head.bias is not None


@pytest.mark.parametrize("name", ["logits_soft_cap", "output_logit_soft_cap"])
def test_other_names_of_the_softcap(name: str) -> None:
    assert LMHead.from_model(FakeModel(nn.Linear(5, 11), **{name: 3.0})).softcap == 3.0


def test_unpadded_vocabulary_of_the_configuration() -> None:
    model = FakeModel(nn.Linear(5, 11), unpadded_vocab_size=9)
    assert LMHead.from_model(model).vocab_size == 9


class LoraLinear(nn.Module):
    """The attributes of PEFT's LoRA layer, and its forward."""

    def __init__(self, dropout: float = 0.0, use_bias: bool = False) -> None:
        super().__init__()
        self.base_layer = nn.Linear(5, 11)
        names = ("default", "other")
        self.lora_A = nn.ModuleDict({name: nn.Linear(5, 2, bias=False) for name in names})
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, 11, bias=use_bias) for name in names})
        self.lora_dropout = nn.ModuleDict({name: nn.Dropout(dropout) for name in names})
        self.scaling = {"default": 2.0, "other": 3.0}
        self.use_dora = {"default": False, "other": False}
        self.lora_variant: dict[str, Any] = {}
        self.active_adapters = ["default", "elsewhere"]
        self.merged = self.disable_adapters = False

    def forward(self, x: Tensor) -> Tensor:
        update = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + self.scaling["default"] * update


def test_head_wrapped_by_peft() -> None:
    layer = LoraLinear().double()
    hidden = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target_ids = torch.arange(7)
    head = LMHead.from_model(FakeModel(layer))
    expected = layer(hidden).log_softmax(-1)[target_ids, target_ids]
    ours = linear_logps(hidden, head, target_ids).logps
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(ours.sum(), list(layer.lora_B["default"].parameters()))
    truth = torch.autograd.grad(expected.sum(), list(layer.lora_B["default"].parameters()))
    torch.testing.assert_close(grads, truth, rtol=0, atol=1e-12)

    layer.disable_adapters = True
    base = LMHead.from_model(FakeModel(layer))
    assert base == LMHead(layer.base_layer.weight, layer.base_layer.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merged": True}, "merged"),
        ({"active_adapters": ["default", "other"]}, "one active adapter"),
        ({"use_dora": {"default": True}}, "DoRA"),
        ({"lora_variant": {"default": object()}}, "DoRA"),
    ],
)
def test_adapters_that_are_more_than_lora_raise(change: dict[str, Any], message: str) -> None:
    layer = LoraLinear()
    for name, value in change.items():
        setattr(layer, name, value)
    with pytest.raises(ValueError, match=message):
        LMHead.from_model(FakeModel(layer))


def test_dropout_bias_and_other_wrappers_raise() -> None:
    layer = LoraLinear(dropout=0.1)
    with pytest.raises(ValueError, match="lora_dropout="):
        LMHead.from_model(FakeModel(layer))
    assert LMHead.from_model(FakeModel(layer.eval())).lora_scale == 2.0
    with pytest.raises(ValueError, match="lora_bias"):
        LMHead.from_model(FakeModel(LoraLinear(use_bias=True)))
    with pytest.raises(ValueError, match="SimpleNamespace"):
        LMHead.from_model(FakeModel(SimpleNamespace(base_layer=nn.Linear(5, 11))))


class NormHead(nn.Linear):
    """A head of its own kind, as Baichuan 2 has one."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


class QuantisedTensor(Tensor):
    """Stands for the tensors of torchao, which claim to be floating point."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (SimpleNamespace(weight=torch.zeros(28, 1, dtype=torch.uint8)), "quantisation"),
        (SimpleNamespace(weight=torch.zeros(11, 5, dtype=torch.int8)), "quantisation"),
        (SimpleNamespace(weight=torch.zeros(11, 5, dtype=torch.float8_e4m3fn)), "quantisation"),
        (SimpleNamespace(weight=torch.zeros(11, 5).as_subclass(QuantisedTensor)), "quantisation"),
        (SimpleNamespace(qweight=torch.zeros(2, 11, dtype=torch.int32)), "weight none"),
        (NormHead(5, 11), "forward of its own"),
        (nn.Embedding(11, 5), "forward of its own"),
        (None, "output embedding"),
    ],
)
def test_heads_without_plain_weights_raise(layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LMHead.from_model(FakeModel(layer))


def make_peft_model(tied: bool, method: str, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = make_model("Llama", {"tie_word_embeddings": tied}, torch.float64)
    model = peft.get_peft_model(model, getattr(peft, method)(**options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise, alpha=0.3)
    return model


ADAPTERS: list[dict[str, Any]] = [
    {"target_modules": ["lm_head", "q_proj"], "lora_alpha": 7},
    {"target_modules": ["lm_head"], "r": 3, "use_rslora": True},
    {"target_modules": ["embed_tokens"], "r": 3},
    {"target_modules": ["embed_tokens"], "r": 3, "ensure_weight_tying": True},
    {"target_modules": ["embed_tokens", "lm_head"], "r": 3},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", ADAPTERS)
def test_head_of_a_peft_model(tied: bool, options: dict[str, Any]) -> None:
    model = make_peft_model(tied, "LoraConfig", **options)
    ours, expected = next_token_logps(model.get_base_model(), LMHead.from_model(model))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    grads = torch.autograd.grad(ours.sum(), trained)
    torch.testing.assert_close(
        grads, torch.autograd.grad(expected.sum(), trained), rtol=1e-9, atol=1e-9
    )
    with model.disable_adapter():
        plain, expected = next_token_logps(model.get_base_model(), LMHead.from_model(model))
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-10)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("tied", "method", "options", "message"),
    [
        (True, "LoraConfig", {"trainable_token_indices": [3, 9]}, "trainable tokens"),
        (False, "LoraConfig", {"trainable_token_indices": {"lm_head": [3]}}, "trainable tokens"),
        (True, "TrainableTokensConfig", {"token_indices": [3]}, "trainable tokens"),
        (False, "LoraConfig", {"target_modules": ["lm_head"], "use_dora": True}, "DoRA"),
        (False, "LoraConfig", {"target_modules": ["lm_head"], "lora_bias": True}, "lora_bias"),
        (False, "LoraConfig", {"target_modules": ["lm_head"], "lora_dropout": 0.1}, "lora_dropout"),
        (False, "LoraConfig", {"target_parameters": ["lm_head.weight"]}, "ParamWrapper"),
        (False, "AdaLoraConfig", {"target_modules": ["lm_head"], "total_step": 9}, "plain LoRA"),
        (False, "IA3Config", {"target_modules": ["lm_head"], "feedforward_modules": []}, "ia3"),
    ],
)
def test_peft_heads_of_other_kinds_raise(
    tied: bool, method: str, options: dict[str, Any], message: str
) -> None:
    if method == "LoraConfig":
        options = {"target_modules": ["q_proj"]} | options
    model = make_peft_model(tied, method, **options)
    with pytest.raises(ValueError, match=message):
        LMHead.from_model(model)


def test_copy_of_the_active_adapter_under_modules_to_save() -> None:
    peft = pytest.importorskip("peft")
    model = make_peft_model(False, "LoraConfig", **ADAPTERS[5])
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    first = LMHead.from_model(model)
    assert first.weight is model.get_output_embeddings().modules_to_save["default"].weight
    model.set_adapter("other")
    second = LMHead.from_model(model)
    assert second.weight is model.get_output_embeddings().original_module.weight
    for head in (first, second):
        model.set_adapter("default" if head is first else "other")
        ours, expected = next_token_logps(model.get_base_model(), head)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
