"""Padded batches as rows of the kernels: what the modules with Liger's signatures share.

B rows of T places, D hidden, V vocabulary. A place that is not trained has an id below 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastrl_kernels.head import LMHead, accumulation_dtype, weight_rows
from fastrl_kernels.linear_logps import linear_logps
from fastrl_kernels.modules import head_of

COLUMNS = 4096  # of the vocabulary, whose weights are summed at a time


class Settings(NamedTuple):
    """How a module runs, which changes no result."""

    workspace_mb: float = 256
    implementation: str = "auto"


def head_with_bias(lin_weight: nn.Module | LMHead | Tensor, bias: Tensor | None) -> LMHead:
    """The head of a weight and a bias, or the one given, which brings its own bias."""
    head = head_of(lin_weight)
    if isinstance(head, Tensor):
        return LMHead(head, bias)
    if bias is not None:
        raise ValueError(
            "bias must be None beside a head that is an LMHead or a layer, which has its own, got "
            f"a tensor of shape {tuple(bias.shape)}; leave it out"
        )
    return head


def check_batch(_input: Tensor, target_ids: Tensor, name: str) -> None:
    """Raise ValueError unless hidden states are (B, T, D) and ids (B, T)."""
    if _input.dim() != 3 or target_ids.shape != _input.shape[:2]:
        raise ValueError(
            f"_input must have shape (B, T, D) and {name} (B, T), got {tuple(_input.shape)} and "
            f"{tuple(target_ids.shape)}; give the hidden state that predicts each id"
        )


def check_table(name: str, table: Tensor, target_ids: Tensor) -> None:
    """Raise ValueError unless there is one number for each id."""
    if table.shape != target_ids.shape:
        raise ValueError(
            f"{name} must have one number for each token, shape {tuple(target_ids.shape)}, got "
            f"{tuple(table.shape)}; cut it to the completions"
        )


def table_logps(
    _input: Tensor, head: LMHead, target_ids: Tensor, settings: Settings, *, temperature: float = 1
) -> Tensor:
    """(B, T) log-probabilities in the dtype of sums, differentiable; 0 where an id is below 0."""
    out = linear_logps(
        _input.flatten(0, 1), head, target_ids.flatten(), temperature=temperature,
        **settings._asdict(),
    )  # fmt: skip
    return out.logps.view_as(target_ids)


@torch.no_grad()
def sums_of_logits(hidden_sums: Tensor, num_rows: Tensor, head: LMHead) -> Tensor:
    """(K,) sums of all logits of K sets of rows, from (K, D) sums of their hidden states.

    num_rows: (K,) in the dtype of sums. No logits are made.
    """
    if head.softcap is not None:
        raise ValueError(
            f"softcap must be None, got a head with {head.softcap}: the mean of its logits, which "
            "this module returns, would need them all; take linear_logps and your own formula"
        )
    row, shift = sum_of_rows(head, hidden_sums.dtype)
    return ((hidden_sums * row).sum(1) + num_rows * shift) * head.logit_scale


@torch.no_grad()
def sum_of_rows(head: LMHead, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """What a hidden state is multiplied by, (D,), and what is added, for the sum of its logits.

    In `dtype`, before logit_scale; of a head without softcap, whose logits are linear.
    """
    row = torch.zeros(head.weight.shape[1], dtype=dtype, device=head.weight.device)
    for start in range(0, head.num_columns, COLUMNS):
        stop = min(start + COLUMNS, head.num_columns)
        row += weight_rows(head, slice(start, stop)).sum(0, dtype=dtype)
    if head.lora_a is not None and head.lora_b is not None:
        expanded = head.lora_b[: head.num_columns].sum(0, dtype=dtype)
        with torch.autocast(row.device.type, enabled=False):
            row = row + head.lora_scale * (expanded @ head.lora_a.to(dtype))
    shift = 0.0 if head.bias is None else head.bias[: head.num_columns].sum(dtype=dtype)
    return row, shift


def sums_over_places(_input: Tensor) -> Tensor:
    """(B, D) sums of the hidden states of each row, in the dtype of sums, without gradient."""
    return _input.detach().sum(1, dtype=accumulation_dtype(_input.dtype))
