"""Attention of one new token a sequence, where sequences of a group share a prefix."""

import warnings

import torch
from torch import Tensor

from fastrl_kernels.decode_attention.op import decode_attention_op
from fastrl_kernels.decode_attention.reference import decode_attention_reference
from fastrl_kernels.implementation import choose_implementation

LARGEST_HEAD = 256  # of the kernels

__all__ = ["decode_attention", "decode_attention_reference"]


def decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    *,
    row_groups: Tensor,
    prefix_lengths: Tensor,
    suffix_length: int | Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attention of the new token of each row over its group's prefix and its own suffix.

    q: (R, H, K). prefix_k: (P, Hkv, L, K) and prefix_v: (P, Hkv, L, Kv) with the tokens of each
    prefix first; suffix_k: (R, Hkv, C, K) and suffix_v: (R, Hkv, C, Kv) with those of each row
    first, the new one included. H is a multiple of Hkv. Columns behind the tokens may hold
    anything. Returns (R, H, Kv), and has no gradients.
    row_groups: (R,) int32, the prefix of each row, not decreasing. A prefix is read once for all
    its rows; one of no rows costs as much as any. prefix_lengths: (P,) int32, 0 or more tokens.
    suffix_length: of all rows, 1 or more; as a 0-d int32 tensor it stays on the device. A GPU
    checks the values of none of these three.
    scale: factor on the scores, K ** -0.5 by default. window: see the last `window` tokens, the new
    one included. softcap: softcap * tanh(scaled score / softcap). sinks: (H,) logits that take part
    in the denominator only.

    implementation: "triton" is the kernels on a GPU, or under the interpreter; "torch" is products
    of whole groups on any device, and waits for a GPU; "auto" picks. A row gets the same bits
    whatever the other rows hold, in calls of the same shapes and groups; "torch" leaves it to
    PyTorch's products whether also in others.
    """
    _check_shapes(q, prefix_k, prefix_v, suffix_k, suffix_v)
    _check_rows(q, prefix_k, row_groups, prefix_lengths)
    suffix_length, on_device = _suffix_length(suffix_length, suffix_k)
    if window is not None and window < 1:
        raise ValueError(
            f"window must be a positive number of tokens, got {window}; pass None to see them all"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; pass None for no cap")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device):
        raise ValueError(
            f"sinks must have one value per head, shape ({q.shape[1]},) on {q.device}, got "
            f"{tuple(sinks.shape)} on {sinks.device}; pass None for none"
        )
    implementation = _choose(implementation, q, suffix_v)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return decode_attention_op(
        q, prefix_k, prefix_v, suffix_k, suffix_v, row_groups, prefix_lengths, suffix_length,
        on_device, sinks, scale, window, softcap, implementation,
    )  # fmt: skip


def _choose(implementation: str, q: Tensor, suffix_v: Tensor) -> str:
    """Name of the implementation to run; a choice that cannot be met raises."""
    chosen = choose_implementation(implementation, q)
    widest = max(q.shape[2], suffix_v.shape[3])
    if chosen == "torch" or widest <= LARGEST_HEAD:
        return chosen
    obstacle = f"the kernels take heads of at most {LARGEST_HEAD}, not {widest}"
    if implementation == "triton":
        raise ValueError(f'implementation="triton" is impossible: {obstacle}; use "torch"')
    warnings.warn(f"decode attention runs as torch: {obstacle}", stacklevel=3)
    return "torch"


def _suffix_length(suffix_length: int | Tensor, suffix_k: Tensor) -> tuple[int, Tensor | None]:
    """The length, and the tensor that says it; then the number is that of the columns."""
    capacity = suffix_k.shape[2]
    if isinstance(suffix_length, Tensor):
        expected = (torch.Size([]), torch.int32, suffix_k.device)
        if (suffix_length.shape, suffix_length.dtype, suffix_length.device) != expected:
            raise ValueError(
                f"suffix_length must be a number, or a torch.int32 tensor of shape () on "
                f"{suffix_k.device}, got {suffix_length.dtype} of shape "
                f"{tuple(suffix_length.shape)} on {suffix_length.device}; all rows have one length"
            )
        return capacity, suffix_length
    if not 1 <= suffix_length <= capacity:
        raise ValueError(
            f"suffix_length must be from 1 to {capacity}, the columns of suffix_k, got "
            f"{suffix_length}; it counts the new token"
        )
    return suffix_length, None


def _check_rows(q: Tensor, prefix_k: Tensor, row_groups: Tensor, prefix_lengths: Tensor) -> None:
    """One group for each row, one length for each group; their values are looked at later."""
    sizes = {"row_groups": q.shape[0], "prefix_lengths": prefix_k.shape[0]}
    for (name, size), found in zip(sizes.items(), (row_groups, prefix_lengths), strict=True):
        if found.shape != (size,) or found.dtype != torch.int32 or found.device != q.device:
            raise ValueError(
                f"{name} must be torch.int32 of shape ({size},) on {q.device}, got {found.dtype} "
                f"of shape {tuple(found.shape)} on {found.device}; row_groups has a value for each "
                "row, prefix_lengths for each prefix"
            )


def _check_shapes(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor
) -> None:
    tensors = {
        "q": q, "prefix_k": prefix_k, "prefix_v": prefix_v, "suffix_k": suffix_k,
        "suffix_v": suffix_v,
    }  # fmt: skip
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    if q.dim() != 3 or any(x.dim() != 4 for x in (prefix_k, prefix_v, suffix_k, suffix_v)):
        raise ValueError(
            "q must have shape (rows, heads, head size), keys and values (groups or rows, heads, "
            f"columns, head size), got {shapes}; q has no dimension for tokens"
        )
    num_kv_heads = suffix_k.shape[1]
    if num_kv_heads < 1 or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"the heads of q must be a multiple of those of the keys, got {q.shape[1]} and "
            f"{num_kv_heads}; check the order of heads and head size"
        )
    for name, rows, columns, size in (
        ("prefix_k", prefix_k.shape[0], prefix_k.shape[2], q.shape[2]),
        ("prefix_v", prefix_k.shape[0], prefix_k.shape[2], suffix_v.shape[3]),
        ("suffix_k", q.shape[0], suffix_k.shape[2], q.shape[2]),
        ("suffix_v", q.shape[0], suffix_k.shape[2], suffix_v.shape[3]),
    ):
        if tensors[name].shape != (rows, num_kv_heads, columns, size):
            raise ValueError(
                f"{name} must have shape {(rows, num_kv_heads, columns, size)}, got {shapes}; "
                "prefixes have an entry for each group, suffixes for each row"
            )
    found = {(x.dtype, x.device) for x in tensors.values()}
    if len(found) > 1 or not q.is_floating_point():
        raise ValueError(
            "q, keys and values must have one floating-point dtype and be on one device, got "
            f"{', '.join(f'{dtype} on {device}' for dtype, device in sorted(found, key=str))}; "
            "cast or move them"
        )
