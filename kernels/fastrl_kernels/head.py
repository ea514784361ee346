"""The language-model head: all that lies between the last hidden state and the logits.

S selected tokens, D hidden, V vocabulary (the weight's rows), r rank of the adapter.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Names in transformers' configurations for a factor on the logits, each read in the model's own
# `forward`.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon-H1; Muse
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM3; Inkling
INVERTED = "hyperclovax"  # its `logits_scaling` multiplies
UNSCALED = "mpt"  # its `logit_scale` is read by nothing


class LMHead(NamedTuple):
    """Weights and constants of a language-model head.

    The logits are z = h W^T (+ lora_scale * (h A^T) B^T) + bias, then z *= logit_scale, then
    z = softcap * tanh(z / softcap). A plain (V, D) weight may stand wherever an LMHead is accepted.
    """

    weight: Tensor
    """(V, D) in bf16, fp16, fp32 or fp64."""
    bias: Tensor | None = None
    """(V,)"""
    lora_a: Tensor | None = None
    """(r, D): first half of an adapter on the head."""
    lora_b: Tensor | None = None
    """(V, r): second half of the adapter."""
    lora_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    """Columns from here on are padding and carry no probability; None where there is no padding."""

    @property
    def num_columns(self) -> int:
        """Columns of the logits that carry probability."""
        return self.vocab_size or self.weight.shape[0]

    @staticmethod
    def from_model(model: Any) -> "LMHead":
        """Head of a transformers causal language model, PEFT-wrapped or not; tensors are shared."""
        output_layer = model.get_output_embeddings()
        if output_layer is None:
            raise ValueError(
                f"expected a model with an output embedding, got {type(model).__name__}; "
                "load it with AutoModelForCausalLM"
            )
        base_layer = getattr(output_layer, "base_layer", output_layer)
        weight = base_layer.weight
        if not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"expected a head of plain floating-point weights, got {type(weight).__name__} of "
                f"{weight.dtype}; exclude the head from quantisation"
            )
        config = model.config
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        head = LMHead(
            weight=weight,
            bias=getattr(base_layer, "bias", None),
            logit_scale=_logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
            vocab_size=_vocab_size(config, weight.shape[0]),
        )
        return _with_adapter(head, output_layer)


def as_lm_head(lm_head: LMHead | Tensor) -> LMHead:
    """The head itself, or a head of nothing but the given weight."""
    return lm_head if isinstance(lm_head, LMHead) else LMHead(lm_head)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of every sum and statistic: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_inputs(hidden_states: Tensor, head: LMHead, target_ids: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit together; looks at no values."""
    if hidden_states.dim() != 2 or not hidden_states.is_floating_point():
        raise ValueError(
            f"hidden_states must be floating point of shape (S, D), got {hidden_states.dtype} of "
            f"shape {tuple(hidden_states.shape)}; flatten a batch with .flatten(0, 1)"
        )
    num_tokens, hidden_size = hidden_states.shape
    if target_ids.shape != (num_tokens,) or target_ids.dtype != torch.int64:
        raise ValueError(
            f"target_ids must be int64 of shape ({num_tokens},), got {target_ids.dtype} of shape "
            f"{tuple(target_ids.shape)}; give one id per row, negative to ignore it"
        )
    check_head(head, hidden_size)
    if head.weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"hidden_states and the head's weight must have one dtype, got {hidden_states.dtype} "
            f"and {head.weight.dtype}; cast with hidden_states.to({head.weight.dtype})"
        )
    for name, tensor in (("target_ids", target_ids), *head._asdict().items()):
        if isinstance(tensor, Tensor) and tensor.device != hidden_states.device:
            raise ValueError(
                f"everything must be on one device, got hidden_states on {hidden_states.device} "
                f"and {name} on {tensor.device}; move {name}"
            )


def check_head(head: LMHead, hidden_size: int) -> None:
    """Raise ValueError unless the parts of the head fit each other and the hidden states."""
    if head.weight.dim() != 2 or head.weight.shape[1] != hidden_size or not head.weight.shape[0]:
        raise ValueError(
            f"the head's weight must have shape (V, {hidden_size}) like hidden_states, got "
            f"{tuple(head.weight.shape)}; pass it as nn.Linear stores it, one row per token id"
        )
    if (head.lora_a is None) != (head.lora_b is None):
        raise ValueError("an adapter needs lora_a and lora_b, got one of them; pass both or none")
    num_rows = head.weight.shape[0]
    expected: dict[str, tuple[int, ...]] = {"bias": (num_rows,)}
    if head.lora_a is not None:
        rank = head.lora_a.shape[0]
        expected |= {"lora_a": (rank, hidden_size), "lora_b": (num_rows, rank)}
    for name, shape in expected.items():
        tensor = getattr(head, name)
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            raise ValueError(
                f"the head's {name} must be floating point of shape {shape}, got {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}; take it from the same layer as the weight"
            )
    if head.vocab_size is not None and not 1 <= head.vocab_size <= num_rows:
        raise ValueError(
            f"vocab_size must be between 1 and the {num_rows} rows of the head's weight, got "
            f"{head.vocab_size}; leave it None where there is no padding"
        )
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap must be positive, got {head.softcap}; pass None for no cap")


def per_token_temperature(temperature: float | Tensor, hidden_states: Tensor) -> Tensor:
    """(S,) constant temperatures in the accumulation dtype, from one number or one per token."""
    num_tokens, dtype = hidden_states.shape[0], accumulation_dtype(hidden_states.dtype)
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {temperature}; "
                "for greedy decoding take argmax_ids at temperature 1"
            )
        return torch.full((num_tokens,), temperature, dtype=dtype, device=hidden_states.device)
    if temperature.shape != (num_tokens,) or temperature.device != hidden_states.device:
        raise ValueError(
            f"temperature must be a number or a tensor of shape ({num_tokens},) on "
            f"{hidden_states.device}, got {tuple(temperature.shape)} on {temperature.device}; "
            "give one value per row of hidden_states"
        )
    if temperature.requires_grad:
        raise ValueError("temperature must be a constant, got one that requires grad; detach it")
    return temperature.to(dtype)


def _logit_scale(config: Any) -> float:
    model_type = getattr(config, "model_type", "")
    scale = 1.0
    for name in MULTIPLIERS:
        factor = getattr(config, name, None)
        if factor is not None and not model_type.startswith(UNSCALED):
            scale *= factor
    for name in DIVISORS:
        divisor = getattr(config, name, None)
        if divisor is not None:
            scale *= divisor if model_type.startswith(INVERTED) else 1 / divisor
    return scale


def _vocab_size(config: Any, num_rows: int) -> int | None:
    vocab_size = config.vocab_size
    unpadded = getattr(config, "unpadded_vocab_size", None)  # Inkling drops the columns past it
    if unpadded is not None:
        vocab_size = min(vocab_size, unpadded)
    return vocab_size if vocab_size < num_rows else None


def _with_adapter(head: LMHead, output_layer: Any) -> LMHead:
    """The head with the active LoRA adapter of a PEFT layer, if it is one."""
    if not hasattr(output_layer, "lora_A"):
        if hasattr(output_layer, "base_layer"):
            raise ValueError(
                f"expected a plain or LoRA head, got {type(output_layer).__name__}; "
                "leave the head out of this adapter"
            )
        return head
    if output_layer.merged:
        raise ValueError("expected an adapter apart from its base, got a merged one; unmerge it")
    active = [name for name in output_layer.active_adapters if name in output_layer.lora_A]
    if output_layer.disable_adapters or not active:
        return head
    if len(active) > 1:
        raise ValueError(f"expected one active adapter on the head, got {active}; activate one")
    return _with_lora(head, output_layer, active[0])


def _with_lora(head: LMHead, layer: Any, name: str) -> LMHead:
    is_dora = getattr(layer, "use_dora", {}).get(name) or name in getattr(layer, "lora_variant", {})
    if is_dora or layer.lora_A[name].bias is not None or layer.lora_B[name].bias is not None:
        raise ValueError(
            f"expected plain LoRA on the head, got adapter {name!r} with DoRA, another variant or "
            "lora_bias; leave the head out of it"
        )
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)  # nn.Identity where there is none
    if layer.training and dropout > 0:
        raise ValueError(
            f"expected no dropout on the head, got lora_dropout={dropout} in training mode; "
            "set lora_dropout=0"
        )
    return head._replace(
        lora_a=layer.lora_A[name].weight,
        lora_b=layer.lora_B[name].weight,
        lora_scale=layer.scaling[name],
    )
