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
    block_size: int | None  # of a 4-bit weight, as is the number of its rows
    num_rows: int | None


NUM_TENSORS = 6


def to_arguments(head: LMHead) -> HeadArguments:
    """Take a head apart."""
    weight = head.weight
    arguments = HeadArguments(
        weight.packed if isinstance(weight, NF4Weight) else weight, head.bias, head.lora_a,
        head.lora_b, None, None, head.lora_scale, head.logit_scale, head.softcap, head.vocab_size,
        None, None,
    )  # fmt: skip
    if not isinstance(weight, NF4Weight):
        return arguments
    return arguments._replace(
        absmax=weight.absmax,
        codebook=weight.codebook,
        block_size=weight.block_size,
        num_rows=weight.num_rows,
    )


def from_arguments(hidden_states: Tensor, *arguments: object) -> LMHead:
    """Put a head together again; width and dtype of a 4-bit weight follow from hidden_states."""
    parts = HeadArguments(*arguments)  # type: ignore[arg-type]
    weight: Tensor | NF4Weight = parts.weight
    if parts.absmax is not None:
        assert parts.codebook is not None
        assert parts.block_size is not None
        assert parts.num_rows is not None
        weight = NF4Weight(
            parts.weight, parts.absmax, parts.codebook, parts.block_size, parts.num_rows,
            hidden_states.shape[1], hidden_states.dtype,
        )  # fmt: skip
    return LMHead(
        weight, parts.bias, parts.lora_a, parts.lora_b, parts.lora_scale, parts.logit_scale,
        parts.softcap, parts.vocab_size,
    )  # fmt: skip
