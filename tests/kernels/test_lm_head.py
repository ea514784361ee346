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
MODELS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Llama", {"tie_word_embeddings": False}, {}),
    ("Qwen3", {"tie_word_embeddings": True}, {}),
    ("Gemma2", {"final_logit_softcapping": 0.7}, {"softcap": 0.7}),
    ("Cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
    ("Granite", {"logits_scaling": 8.0}, {"logit_scale": 0.125}),
    ("HyperCLOVAX", {"logits_scaling": 8.0}, {"logit_scale": 8.0}),
]


def make_model(family: str, options: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)  # transformers initialises from the global generator
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far enough from uniform logits that a wrong scale shows
    return model


def next_token_logps(model: nn.Module, head: LMHead) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a random row: by linear_logps, and from the model's logits."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 83, (1, 17), generator=generator)
    with torch.no_grad():
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
    assert head.vocab_size is None
    for name, value in fields.items():
        assert getattr(head, name) == value
    ours, expected = next_token_logps(model, head)
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    if fields:
        ours, expected = next_token_logps(model, LMHead(head.weight))
        assert (ours - expected).abs().max() > 1e-3


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


def test_heads_without_plain_weights_raise() -> None:
    quantised = SimpleNamespace(weight=torch.zeros(28, 1, dtype=torch.uint8), bias=None)
    with pytest.raises(ValueError, match="quantisation"):
        LMHead.from_model(FakeModel(quantised))
    with pytest.raises(ValueError, match="output embedding"):
        LMHead.from_model(FakeModel(None))
