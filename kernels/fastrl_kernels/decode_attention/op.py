"""`fastrl::decode_attention` as an operator, for torch.compile and fakes.

R rows, P groups, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values, L
prefix columns, C suffix columns.
"""

import torch
from torch import Tensor

from fastrl_kernels.decode_attention.grouped import Options, grouped_attention
from fastrl_kernels.implementation import on_device


@torch.library.custom_op("fastrl::decode_attention", mutates_args=())
def decode_attention_op(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    row_groups: Tensor,
    prefix_lengths: Tensor,
    suffix_length: int,
    suffix_length_on_device: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    implementation: str,
) -> Tensor:
    """(R, H, Kv) outputs; the tensor's suffix length counts if there is one."""
    options = Options(scale, window, softcap)
    if implementation == "triton":
        from fastrl_kernels.decode_attention import launch  # triton may be missing

        launch.check_readable(
            prefix_k=prefix_k, prefix_v=prefix_v, suffix_k=suffix_k, suffix_v=suffix_v
        )
        with on_device(q):
            return launch.forward(
                q, prefix_k, prefix_v, suffix_k, suffix_v, row_groups, prefix_lengths,
                suffix_length, suffix_length_on_device, sinks, options,
            )  # fmt: skip
    if suffix_length_on_device is not None:
        suffix_length = int(suffix_length_on_device)
        if not 1 <= suffix_length <= suffix_k.shape[2]:
            raise ValueError(
                f"suffix_length must be from 1 to {suffix_k.shape[2]}, the columns of suffix_k, "
                f"got {suffix_length}; it counts the new token"
            )
    # Autocast would round the float32 operands of every product to half precision.
    with torch.autocast(q.device.type, enabled=False):
        return grouped_attention(
            q, prefix_k, prefix_v, suffix_k, suffix_v, row_groups, prefix_lengths, suffix_length,
            sinks, options,
        )  # fmt: skip


@decode_attention_op.register_fake
def _(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor,
    *_: object,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:2], suffix_v.shape[3])
