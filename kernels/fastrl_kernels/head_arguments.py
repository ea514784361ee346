"""A head as arguments of an operator, which takes tensors and numbers but no records."""

from typing import NamedTuple

from torch import Tensor

from fastrl_kernels.head import LMHead
from fastrl_kernels.nf4 import NF4Weight


class HeadArguments(NamedTuple):
    """The tensors of a head, then its constants; operators take them in this order."""

    weight: Tensor  # (V, D), or the bytes of a 4-bit weight
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    absmax: Tensor | None  # of a 4-bit weight, as is the codebook
    codebook: Tensor | None
    lora_scale: float
    logit_scale: float
    softcap: float | None
    vocab_size: int | None
    block_size: int | None  # of a 4-bit weight


NUM_TENSORS = 6


def to_arguments(head: LMHead) -> HeadArguments:
    """Take a head apart."""
    weight, absmax, codebook, block_size = head.weight, None, None, None
    if isinstance(weight, NF4Weight):
        absmax, codebook, block_size = weight.absmax, weight.codebook, weight.block_size
        weight = weight.packed
    tensors = (weight, head.bias, head.lora_a, head.lora_b, absmax, codebook)
    return HeadArguments(
        *tensors, head.lora_scale, head.logit_scale, head.softcap, head.vocab_size, block_size
    )


def from_arguments(hidden_states: Tensor, *arguments: object) -> LMHead:
    """Put a head together again; sizes and dtype of a 4-bit weight follow from hidden_states."""
    parts = HeadArguments(*arguments)  # type: ignore[arg-type]
    weight: Tensor | NF4Weight = parts.weight
    if parts.absmax is not None and parts.codebook is not None and parts.block_size is not None:
        hidden_size = hidden_states.shape[1]
        num_rows = 2 * parts.weight.numel() // hidden_size
        weight = NF4Weight(
            parts.weight, parts.absmax, parts.codebook, parts.block_size, num_rows, hidden_size,
            hidden_states.dtype,
        )  # fmt: skip
    return LMHead(
        weight, parts.bias, parts.lora_a, parts.lora_b, parts.lora_scale, parts.logit_scale,
        parts.softcap, parts.vocab_size,
    )  # fmt: skip
