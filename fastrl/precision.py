"""In what dtype weights are kept, and what the head computes in.

`model.precision` is one of
- float32: weights and layers in float32;
- autocast: trained weights in float32, layers under bfloat16 autocast;
- split, stochastic: weights and layers in bfloat16; what bfloat16 cannot hold of an update is in
  the optimizer's state (split) or rounded by chance (stochastic), see fastrl/optim.py.
Weights below an adapter never change: they are kept in bfloat16 unless layers run in float32.

Legend: D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from fastrl_kernels import LMHead
from fastrl_kernels.nf4 import NF4Weight

PRECISIONS = ("float32", "autocast", "split", "stochastic")


def trained_dtype(precision: str) -> torch.dtype:
    """Of weights that are trained."""
    return torch.float32 if precision in ("float32", "autocast") else torch.bfloat16


def frozen_dtype(precision: str) -> torch.dtype:
    """Of weights that are not, because an adapter is."""
    return torch.float32 if precision == "float32" else torch.bfloat16


def store_weights(model: nn.Module, *, trained: torch.dtype, frozen: torch.dtype) -> None:
    """Keep floating-point parameters in these dtypes; buffers, such as angles, stay as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)


def head_in_float32(head: LMHead) -> LMHead:
    """The head with float32 copies of its tensors; gradients reach the originals.

    Takes 4 V D bytes as long as the copy lives, and as many again for its gradient. Statistics of a
    half-precision head come from float32 sums all the same (fastrl_kernels): what a copy changes is
    that hidden states and the gradient of the logits are not rounded to half precision.
    """
    return head_in_dtype(head, torch.float32)


def head_in_dtype(head: LMHead, dtype: torch.dtype) -> LMHead:
    """The head with its tensors in another dtype; gradients reach the originals."""
    if isinstance(head.weight, NF4Weight):
        head = head._replace(weight=head.weight._replace(dtype=dtype))
    else:
        head = head._replace(weight=head.weight.to(dtype))
    return head._replace(
        bias=None if head.bias is None else head.bias.to(dtype),
        lora_a=None if head.lora_a is None else head.lora_a.to(dtype),
        lora_b=None if head.lora_b is None else head.lora_b.to(dtype),
    )
