"""The language-model head: all that lies between the last hidden state and the logits.

S selected tokens, D hidden, V vocabulary (the weight's rows), r rank of the adapter.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.nf4 import NF4Weight, check_nf4


class LMHead(NamedTuple):
    """Weights and constants of a language-model head.

    The logits are z = h W^T (+ lora_scale * (h A^T) B^T) + bias, then z *= logit_scale, then
    z = softcap * tanh(z / softcap). A plain (V, D) weight may stand wherever an LMHead is accepted.
    """

    weight: Tensor | NF4Weight  # (V, D)
    """(V, D) in bf16, fp16, fp32 or fp64, or frozen in 4 bits; `weight_rows` reads either."""
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
        """Head of a transformers causal language model, PEFT-wrapped or not; tensors are shared.

        Raises ValueError for a head of another form: other quantisations and adapters.
        """
        from fastrl_kernels.model_head import head_of_model

        return head_of_model(model)


def as_lm_head(lm_head: LMHead | Tensor) -> LMHead:
    """The head itself, or a head of nothing but the given weight."""
    return lm_head if isinstance(lm_head, LMHead) else LMHead(lm_head)


def weight_rows(head: LMHead, columns: slice) -> Tensor:
    """(columns, D) rows of the weight for these columns of the logits: a view, or dequantised."""
    if isinstance(head.weight, NF4Weight):
        start, stop, step = columns.indices(head.weight.num_rows)
        assert step == 1
        return head.weight.rows(start, max(start, stop))
    return head.weight[columns]


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
        is_placed = isinstance(tensor, Tensor | NF4Weight)
        if is_placed and tensor.device != hidden_states.device:
            raise ValueError(
                f"everything must be on one device, got hidden_states on {hidden_states.device} "
                f"and {name} on {tensor.device}; move {name}"
            )


def check_head(head: LMHead, hidden_size: int) -> None:
    """Raise ValueError unless the parts of the head fit each other and the hidden states."""
    shape = head.weight.shape
    if len(shape) != 2 or shape[1] != hidden_size or not shape[0]:
        raise ValueError(
            f"the head's weight must have shape (V, {hidden_size}) like hidden_states, got "
            f"{tuple(shape)}; pass it as nn.Linear stores it, one row per token id"
        )
    if isinstance(head.weight, NF4Weight):
        check_nf4(head.weight)
    if (head.lora_a is None) != (head.lora_b is None):
        raise ValueError("an adapter needs lora_a and lora_b, got one of them; pass both or none")
    num_rows = shape[0]
    expected: dict[str, tuple[int, ...]] = {"bias": (num_rows,)}
    if head.lora_a is not None:
        rank = head.lora_a.shape[0]
        expected |= {"lora_a": (rank, hidden_size), "lora_b": (num_rows, rank)}
    for name, size in expected.items():
        tensor = getattr(head, name)
        if tensor is not None and (tensor.shape != size or not tensor.is_floating_point()):
            raise ValueError(
                f"the head's {name} must be floating point of shape {size}, got {tensor.dtype} of "
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
